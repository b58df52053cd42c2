// Products of bfloat16 for x86-64 with AVX512, VNNI and BF16.
#include "convert_tile.h"
#include "kernels.h"
#include "pointwise_tile.h"
#include "rate.h"

namespace convmixer_fast::cpu {

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels table = *avx512_vnni_kernels();
    table.isa = "avx512_bf16";
    table.bfloat16_tile = convert_tile<ToBfloat16<16>, 16>;
    table.pointwise_bfloat16_tile = pointwise_tile<Bfloat16, 14, 2, 16>;
    table.rate = rate<16>;
    return table;
  }();
  return &kernels;
}

}  // namespace convmixer_fast::cpu
