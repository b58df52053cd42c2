// Kernels for x86-64 with AVX2.
#include "isa_kernels.h"

namespace convmixer_fast::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels<8, 6, 2, 8, 5>("avx2");
  return &kernels;
}

}  // namespace convmixer_fast::cpu
