// Kernels for x86-64 with AVX512.
#include "isa_kernels.h"

namespace convmixer_fast::cpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels<16, 14, 2, 16, 12>("avx512");
  return &kernels;
}

}  // namespace convmixer_fast::cpu
