#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace convmixer_fast::cpu {
namespace {

constexpr char kOverride[] = "CONVMIXER_FAST_CPU_ISA";

struct Candidate {
  const char* name;
  const Kernels* (*kernels)();  // null where the ISA is not compiled in
  bool supported;
};

const Kernels* select() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {{"avx512", avx512_kernels, avx512},
                                  {"avx2", avx2_kernels, avx2},
                                  {"baseline", baseline_kernels, true}};
#else
  const Candidate candidates[] = {{"avx512", nullptr, false},
                                  {"avx2", nullptr, false},
                                  {"baseline", baseline_kernels, true}};
#endif
  const char* named = std::getenv(kOverride);
  for (const Candidate& candidate : candidates) {
    if (named != nullptr && std::string(named) != candidate.name) continue;
    if (candidate.supported) return candidate.kernels();
    if (named != nullptr) {
      throw std::invalid_argument(std::string(kOverride) + "=" + named +
                                  ": this machine cannot run these kernels; unset the variable");
    }
  }
  throw std::invalid_argument(std::string(kOverride) +
                              " must be 'baseline', 'avx2' or 'avx512', got '" + named + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const selected = select();
  return *selected;
}

}  // namespace convmixer_fast::cpu
