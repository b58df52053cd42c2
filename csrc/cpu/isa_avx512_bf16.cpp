// Products of bfloat16 for x86-64 with AVX512 and BF16.
#include <x86intrin.h>

#include "convert_tile.h"
#include "kernels.h"
#include "pointwise_tile.h"

namespace convmixer_fast::cpu {
namespace {

// The least ticks that many products take which do not wait for each other.
template <class Arithmetic>
uint64_t ticks() {
  constexpr int kSums = 24;
  constexpr Word kZeros[16] = {};
  uint64_t least = ~uint64_t{0};
  for (int round = 0; round < 8; ++round) {
    typename Arithmetic::Words y = Arithmetic::load(kZeros);
    typename Arithmetic::Sum sum[kSums] = {};
    const uint64_t begin = __rdtsc();
    for (int i = 0; i < 400; ++i) {
#pragma GCC unroll 32
      for (int s = 0; s < kSums; ++s) {
        asm volatile("" : "+v"(y));  // else one product would be added to all sums
        sum[s] = Arithmetic::add_product(sum[s], y, y);
      }
    }
    const uint64_t taken = __rdtsc() - begin;
    for (int s = 0; s < kSums; ++s) asm volatile("" ::"v"(sum[s]));
    if (taken < least) least = taken;
  }
  return least;
}

double bfloat16_speed() {
  return 2.0 * static_cast<double>(ticks<Float32<16>>()) /
         static_cast<double>(ticks<Bfloat16>());
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels table = *avx512_vnni_kernels();
    table.isa = "avx512_bf16";
    table.bfloat16_tile = convert_tile<ToBfloat16<16>, 16>;
    table.pointwise_bfloat16_tile = pointwise_tile<Bfloat16, 14, 2, 16>;
    table.bfloat16_speed = bfloat16_speed;
    return table;
  }();
  return &kernels;
}

}  // namespace convmixer_fast::cpu
