// Vectors of floats: GCC's and Clang's vector extensions, so that one source serves every ISA.
//
// Included once per ISA. Everything has internal linkage, and nothing of the standard library
// is instantiated: the linker would merge such a function with its namesakes and might keep
// the copy that only the newest machines can run.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define CONVMIXER_FAST_INLINE inline __attribute__((always_inline))

namespace convmixer_fast::cpu {
namespace {

template <int kWidth>
struct VectorOf {
  typedef float Type __attribute__((vector_size(kWidth * sizeof(float))));
};

// kWidth floats. A width beyond the ISA's registers compiles, into very slow code.
template <int kWidth>
using Vector = typename VectorOf<kWidth>::Type;

// A mask or the bits of a Vector.
template <int kWidth>
struct BitsOf {
  typedef int32_t Type __attribute__((vector_size(kWidth * sizeof(int32_t))));
};

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> load(const float* source) {
  Vector<kWidth> v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

template <int kWidth>
CONVMIXER_FAST_INLINE void store(float* target, Vector<kWidth> v) {
  std::memcpy(target, &v, sizeof v);
}

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> broadcast(float value) {
  return value - Vector<kWidth>{};
}

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> absolute(Vector<kWidth> v) {
  using Bits = typename BitsOf<kWidth>::Type;
  return reinterpret_cast<Vector<kWidth>>(reinterpret_cast<Bits>(v) & 0x7fffffff);
}

// x where it is above 0, otherwise 0; x - x rather than 0: it keeps NaN, and makes NaN of infinities.
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> positive_part(Vector<kWidth> x) {
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {
    const __m512 v = reinterpret_cast<__m512>(x);
    const __mmask16 others = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NGT_UQ);
    return reinterpret_cast<Vector<16>>(_mm512_mask_sub_ps(v, others, v, v));
  }
#endif
  return x > 0.0F ? x : x - x;
}

// Makes the compiler forget what it knows of a register.
template <class Register>
CONVMIXER_FAST_INLINE void keep(Register& v) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(v));
#elif defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+x"(v));
#endif
}

CONVMIXER_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CONVMIXER_FAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace convmixer_fast::cpu
