// Products of words: one float32 times another, two bfloat16 times two others, or four numbers of 8
// bits times four others.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// 32 bits, whatever is in them; read and written as bytes.
struct Word {
  unsigned char bytes[4];
};

template <int kWidth>
CONVMIXER_FAST_INLINE typename BitsOf<kWidth>::Type load_bits(const Word* source) {
  typename BitsOf<kWidth>::Type v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

template <int kWidth>
CONVMIXER_FAST_INLINE typename BitsOf<kWidth>::Type broadcast_bits(const Word* source) {
  int32_t value;
  std::memcpy(&value, source, sizeof value);
  return value - typename BitsOf<kWidth>::Type{};
}

template <int kWidth>
struct Float32 {
  using Words = Vector<kWidth>;
  using Sum = Vector<kWidth>;

  // Sums are made of pieces of this depth: one long chain of additions loses more digits.
  static constexpr int64_t kSumDepth = 64;

  static CONVMIXER_FAST_INLINE Words load(const Word* source) {
    Words v;
    std::memcpy(&v, source, sizeof v);
    return v;
  }
  static CONVMIXER_FAST_INLINE Words broadcast(const Word* source) {
    float value;
    std::memcpy(&value, source, sizeof value);
    return cpu::broadcast<kWidth>(value);
  }
  static CONVMIXER_FAST_INLINE Sum add_product(Sum sum, Words y, Words weight) {
    return sum + y * weight;
  }
  static CONVMIXER_FAST_INLINE Vector<kWidth> to_float(Sum sum, const float*, int64_t) { return sum; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16; sums are of float32.
struct Bfloat16 {
  using Words = BitsOf<16>::Type;
  using Sum = Vector<16>;

  static constexpr int64_t kSumDepth = 64;

  static CONVMIXER_FAST_INLINE Words load(const Word* source) { return load_bits<16>(source); }
  static CONVMIXER_FAST_INLINE Words broadcast(const Word* source) {
    return broadcast_bits<16>(source);
  }
  static CONVMIXER_FAST_INLINE Sum add_product(Sum sum, Words y, Words weight) {
    return reinterpret_cast<Sum>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                  reinterpret_cast<__m512bh>(y),
                                                  reinterpret_cast<__m512bh>(weight)));
  }
  static CONVMIXER_FAST_INLINE Vector<16> to_float(Sum sum, const float*, int64_t) { return sum; }
};
#endif

// y unsigned, weights signed and at most 64 in size, so that two products fit in 16 bits, which is
// where processors without VNNI add them. Sums of 32 bits are exact, up to a depth of 131,000.
template <int kWidth>
struct Int8 {
  using Words = typename BitsOf<kWidth>::Type;
  using Sum = Words;

  static constexpr int64_t kSumDepth = int64_t{1} << 40;

  static CONVMIXER_FAST_INLINE Words load(const Word* source) { return load_bits<kWidth>(source); }
  static CONVMIXER_FAST_INLINE Words broadcast(const Word* source) {
    return broadcast_bits<kWidth>(source);
  }
  static CONVMIXER_FAST_INLINE Sum add_product(Sum sum, Words y, Words weight) {
#if defined(__AVX512VNNI__)
    if constexpr (kWidth == 16) {
      return reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                       reinterpret_cast<__m512i>(y),
                                                       reinterpret_cast<__m512i>(weight)));
    }
#endif
#if defined(__AVXVNNI__)
    if constexpr (kWidth == 8) {
      return reinterpret_cast<Sum>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum),
                                                           reinterpret_cast<__m256i>(y),
                                                           reinterpret_cast<__m256i>(weight)));
    }
#endif
#if defined(__AVX512BW__)
    if constexpr (kWidth == 16) {
      const __m512i pairs = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(y),
                                                 reinterpret_cast<__m512i>(weight));
      return sum + reinterpret_cast<Sum>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (kWidth == 8) {
      const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(y),
                                                 reinterpret_cast<__m256i>(weight));
      return sum + reinterpret_cast<Sum>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
    for (int shift = 24; shift >= 0; shift -= 8) {
      sum += (y << (24 - shift) >> 24 & 0xff) * (weight << (24 - shift) >> 24);
    }
    return sum;
  }

  // Times the scales of the channels from `channel` on.
  static CONVMIXER_FAST_INLINE Vector<kWidth> to_float(Sum sum, const float* scale,
                                                       int64_t channel) {
    return __builtin_convertvector(sum, Vector<kWidth>) * cpu::load<kWidth>(scale + channel);
  }
};

}  // namespace
}  // namespace convmixer_fast::cpu
