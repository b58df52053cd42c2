// Activations to numbers of 8 bits.
#pragma once

#include "arithmetic.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// The number of each lane, in its low 8 bits; those above are not zero.
template <int kWidth>
CONVMIXER_FAST_INLINE typename BitsOf<kWidth>::Type quantize(const float* source,
                                                             const QuantizeTile& tile) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kRound = 12582912.0F;
  const Vector<kWidth> low = broadcast<kWidth>(-tile.zero);
  const Vector<kWidth> high = broadcast<kWidth>(255.0F - tile.zero);
  Vector<kWidth> v = load<kWidth>(source) * tile.inverse_scale;
  v = v < low ? low : v;
  v = v > high ? high : v;
  return reinterpret_cast<typename BitsOf<kWidth>::Type>(v + (kRound + tile.zero));
}

template <int kWidth>
void quantize_tile(const QuantizeTile& tile) {
  using Bits = typename BitsOf<kWidth>::Type;
  Word* out = static_cast<Word*>(tile.out);
  for (int64_t quad = 0; quad < tile.blocks; quad += kQuad, out += tile.out_block_stride) {
    const int64_t blocks = smaller(kQuad, tile.blocks - quad);
    const float* source = tile.y + quad * tile.y_block_stride;
    for (int64_t at = 0; at < tile.pixels * kBlock; at += kWidth) {
      Bits words = quantize<kWidth>(source + at, tile) & 0xff;
      for (int64_t block = 1; block < blocks; ++block) {
        words |= (quantize<kWidth>(source + block * tile.y_block_stride + at, tile) & 0xff)
                 << (8 * static_cast<int32_t>(block));
      }
      std::memcpy(out + at, &words, sizeof words);
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
