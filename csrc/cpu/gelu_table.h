// erfc(t / sqrt(2)) / 2 by table, where registers of 16 floats make looking up 32 entries cheap.
#pragma once

#include "simd.h"

namespace convmixer_fast::cpu {

constexpr int kTableIntervals = 32;
constexpr int kTableDegree = 4;
constexpr int kTableTerms = kTableDegree + 2;
constexpr float kGeluLimit = 6.0F;
// Intervals are centred at whole multiples of 1 / kPerUnit, the last one at kGeluLimit.
constexpr float kPerUnit = (kTableIntervals - 1) / kGeluLimit;

// On each interval the coefficients of a polynomial in the distance from its middle, in intervals:
// kGeluTable[term][interval]. Error below 1e-8. What rounding the constant one to a float leaves is
// the last term: it would be the same error in every result of an interval, which a mean over
// many pixels does not average out.
extern const float (&kGeluTable)[kTableTerms][kTableIntervals];

#if defined(__AVX512F__)
namespace {

// base - t * Q(t), with Q by the table.
CONVMIXER_FAST_INLINE Vector<16> subtract_by_table(
    const float (&table)[kTableTerms][kTableIntervals], Vector<16> base, Vector<16> t) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits, all that looking up reads.
  constexpr float kRound = 12582912.0F;
  const Vector<16> shifted = t * kPerUnit + kRound;
  const Vector<16> u = t * kPerUnit - (shifted - kRound);
  const auto look_up = [&](int term) {
    return reinterpret_cast<Vector<16>>(_mm512_permutex2var_ps(
        _mm512_load_ps(table[term]), reinterpret_cast<__m512i>(shifted),
        _mm512_load_ps(table[term] + 16)));
  };
  Vector<16> value = look_up(kTableDegree);
#pragma GCC unroll 8
  for (int term = kTableDegree - 1; term > 0; --term) value = value * u + look_up(term);
  value = value * u + look_up(kTableDegree + 1);
  return base - t * (look_up(0) + value);
}

}  // namespace
#endif

}  // namespace convmixer_fast::cpu
