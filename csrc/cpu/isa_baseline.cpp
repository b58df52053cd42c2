// Kernels for any machine: SSE2 on x86-64, NEON on AArch64.
#include "isa_kernels.h"

namespace convmixer_fast::cpu {

const Kernels* baseline_kernels() {
#if defined(__aarch64__)
  static constexpr Kernels kernels = make_kernels<4, 7, 4, 16, 4>("baseline");
#else
  static constexpr Kernels kernels = make_kernels<4, 6, 2, 8, 3>("baseline");
#endif
  return &kernels;
}

}  // namespace convmixer_fast::cpu
