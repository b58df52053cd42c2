// Vectors of floats: GCC's and Clang's vector extensions, so that one source serves every ISA.
//
// Included once per ISA. Everything has internal linkage, and nothing of the standard library
// is instantiated: the linker would merge such a function with its namesakes and might keep
// the copy that only the newest machines can run.
#pragma once

#include <cstdint>
#include <cstring>

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

CONVMIXER_FAST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
CONVMIXER_FAST_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Short copies and fills, inline: a call of memcpy costs more than a row of a small plane.
template <int kWidth>
CONVMIXER_FAST_INLINE void copy_floats(float* target, const float* source, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store<kWidth>(target + i, load<kWidth>(source + i));
  if constexpr (kWidth > 4) {
    if (i < count) copy_floats<kWidth / 2>(target + i, source + i, count - i);
  } else {
    for (; i < count; ++i) target[i] = source[i];
  }
}

template <int kWidth>
CONVMIXER_FAST_INLINE void fill(float* target, float value, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store<kWidth>(target + i, broadcast<kWidth>(value));
  for (; i < count; ++i) target[i] = value;
}

}  // namespace
}  // namespace convmixer_fast::cpu
