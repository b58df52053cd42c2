// Products of 8-bit numbers for x86-64 with AVX512 and VNNI.
#include "kernels.h"
#include "pointwise_tile.h"
#include "rate.h"

namespace convmixer_fast::cpu {

const Kernels* avx512_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels table = *avx512_kernels();
    table.isa = "avx512_vnni";
    table.pointwise_int8_tile = pointwise_tile<Int8<16>, 14, 2, 16>;
    table.rate = rate<16>;
    return table;
  }();
  return &kernels;
}

}  // namespace convmixer_fast::cpu
