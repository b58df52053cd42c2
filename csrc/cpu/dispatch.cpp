#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace convmixer_fast::cpu {
namespace {

constexpr char kOverride[] = "CONVMIXER_FAST_CPU_ISA";

struct Candidate {
  const char* name;
  const Kernels* (*kernels)();  // null where the ISA is not compiled in
  bool supported;
};

#if defined(__x86_64__)
// Compilers older than this instruction do not know its name.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

const Kernels* select() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool avx2_vnni = avx2 && has_avx_vnni();
  const bool avx512_bf16 = avx512_vnni && __builtin_cpu_supports("avx512bf16");
  const Candidate candidates[] = {{"avx512_bf16", avx512_bf16_kernels, avx512_bf16},
                                  {"avx512_vnni", avx512_vnni_kernels, avx512_vnni},
                                  {"avx512", avx512_kernels, avx512},
                                  {"avx2_vnni", avx2_vnni_kernels, avx2_vnni},
                                  {"avx2", avx2_kernels, avx2},
                                  {"baseline", baseline_kernels, true}};
#else
  const Candidate candidates[] = {{"avx512_bf16", nullptr, false},
                                  {"avx512_vnni", nullptr, false},
                                  {"avx512", nullptr, false},
                                  {"avx2_vnni", nullptr, false},
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
                              " must be 'baseline', 'avx2', 'avx2_vnni', 'avx512', "
                              "'avx512_vnni' or 'avx512_bf16', got '" + named + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const selected = select();
  return *selected;
}

}  // namespace convmixer_fast::cpu
