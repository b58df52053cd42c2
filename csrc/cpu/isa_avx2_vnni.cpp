// Products of 8-bit numbers for x86-64 with AVX2 and VNNI.
#include "kernels.h"
#include "pointwise_tile.h"
#include "rate.h"

namespace convmixer_fast::cpu {

const Kernels* avx2_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels table = *avx2_kernels();
    table.isa = "avx2_vnni";
    table.pointwise_int8_tile = pointwise_tile<Int8<8>, 6, 2, 8>;
    table.rate = rate<8>;
    return table;
  }();
  return &kernels;
}

}  // namespace convmixer_fast::cpu
