// Activations to smaller numbers, several to a word.
#pragma once

#include "arithmetic.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

template <int kWidth>
struct ToInt8 {
  static constexpr int kBits = 8;

  // The number of each lane.
  static CONVMIXER_FAST_INLINE typename BitsOf<kWidth>::Type convert(Vector<kWidth> v,
                                                                     const ConvertTile& tile) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    constexpr float kRound = 12582912.0F;
    const Vector<kWidth> low = broadcast<kWidth>(-tile.zero);
    const Vector<kWidth> high = broadcast<kWidth>(255.0F - tile.zero);
    v = v * tile.inverse_scale;
    v = v < low ? low : v;
    v = v > high ? high : v;
    return reinterpret_cast<typename BitsOf<kWidth>::Type>(v + (kRound + tile.zero)) & 0xff;
  }
};

template <int kWidth>
struct ToBfloat16 {
  static constexpr int kBits = 16;

  static CONVMIXER_FAST_INLINE typename BitsOf<kWidth>::Type convert(Vector<kWidth> v,
                                                                     const ConvertTile&) {
    using Bits = typename BitsOf<kWidth>::Type;
    const Bits bits = reinterpret_cast<Bits>(v);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
    // A NaN could become an infinity, or wrap round to a number.
    return v == v ? rounded : (bits >> 16 & 0xffff) | 0x40;
  }
};

template <class To, int kWidth>
void convert_tile(const ConvertTile& tile) {
  constexpr int64_t kGroup = 32 / To::kBits;
  Word* out = static_cast<Word*>(tile.out);
  for (int64_t first = 0; first < tile.blocks; first += kGroup, out += tile.out_block_stride) {
    const int64_t blocks = smaller(kGroup, tile.blocks - first);
    const float* source = tile.y + first * tile.y_block_stride;
    for (int64_t at = 0; at < tile.pixels * kBlock; at += kWidth) {
      typename BitsOf<kWidth>::Type words = To::convert(load<kWidth>(source + at), tile);
      for (int64_t block = 1; block < blocks; ++block) {
        words |= To::convert(load<kWidth>(source + block * tile.y_block_stride + at), tile)
                 << (To::kBits * static_cast<int32_t>(block));
      }
      std::memcpy(out + at, &words, sizeof words);
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
