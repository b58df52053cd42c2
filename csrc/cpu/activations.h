// The activations on vectors, with PyTorch's treatment of NaN and infinities.
#pragma once

#include "gelu_table.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// Beyond it t * Q(t) of SiLU is below 1e-24 and stays constant.
constexpr float kSiluLimit = 60.0F;

// Both forms of GELU, and SiLU, are x * (1 - Q(x)) with a Q that falls from 1 to 0 and Q(-x) = 1 - Q(x). With
// t = |x| that is relu(x) - t * Q(t): what is approximated is small where the result is large, so
// what it costs stays below 1e-7 everywhere, and small results keep their digits. That matters, as
// the BatchNorm behind a channel of small results has a large scale. Beyond kGeluLimit t * Q(t)
// is below 1e-8 and stays constant.
template <int kWidth, int kTerms>
CONVMIXER_FAST_INLINE Vector<kWidth> polynomial(const float (&coefficients)[kTerms],
                                                Vector<kWidth> u) {
  Vector<kWidth> value = broadcast<kWidth>(coefficients[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) value = value * u + coefficients[i];
  return value;
}

// exp(-v) for v from 0 to 60: what is approximated is exact to 2e-9, the rest is rounding.
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> exp_of_minus(Vector<kWidth> v) {
  using Bits = typename BitsOf<kWidth>::Type;
  // 2^u on [-1/2, 1/2], minimax of the relative error.
  constexpr float kExp2[] = {1.000000001e+00F, 6.931472057e-01F, 2.402264689e-01F,
                             5.550328776e-02F, 9.618488961e-03F, 1.339993162e-03F,
                             1.534581196e-04F};
  constexpr float kLog2E = 1.44269504F;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  constexpr float kRound = 12582912.0F;
  const Vector<kWidth> exponent = -kLog2E * v;
  const Vector<kWidth> shifted = exponent + kRound;
  const Vector<kWidth> fraction = exponent - (shifted - kRound);
  const Bits power = reinterpret_cast<Bits>(shifted) << 23;
  return reinterpret_cast<Vector<kWidth>>(
      reinterpret_cast<Bits>(polynomial<kWidth>(kExp2, fraction)) + power);
}

// base - t * Q(t) with the Q of the exact form: erfc(t / sqrt(2)) / 2.
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> subtract_gelu_tail(Vector<kWidth> base, Vector<kWidth> t) {
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) return subtract_by_table(kGeluTable, base, t);
#endif
  // exp(-t^2 / 2) times a polynomial in 1 / (1 + 0.32 t), minimax of the relative error (3e-8).
  constexpr float kScaled[] = {-2.210379792e-04F, 1.311217765e-01F,  1.045006299e-01F,
                               2.005206266e-01F,  -1.016824720e-01F, 2.994387994e-01F,
                               -1.403784664e-01F, -3.218146016e-03F, 9.918305919e-03F};
  const Vector<kWidth> s = 1.0F / (1.0F + 0.32F * t);
  return base - t * (exp_of_minus<kWidth>(0.5F * t * t) * polynomial<kWidth>(kScaled, s));
}

// Q of the tanh form: 1 / (1 + exp(2 sqrt(2 / pi) (t + 0.044715 t^3))).
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> gelu_tanh_tail(Vector<kWidth> t) {
  const Vector<kWidth> e = exp_of_minus<kWidth>(t * (1.595769122F + 0.0713548163F * t * t));
  return e / (1.0F + e);
}

// Q of SiLU: 1 - 1 / (1 + exp(-t)).
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> silu_tail(Vector<kWidth> t) {
  const Vector<kWidth> e = exp_of_minus<kWidth>(t);
  return e / (1.0F + e);
}

// x * (1 - Q(x)), which both forms of GELU, and SiLU, are.
template <Activation kActivation, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> gated(Vector<kWidth> x) {
  const Vector<kWidth> magnitude = absolute<kWidth>(x);
  const Vector<kWidth> limit =
      broadcast<kWidth>(kActivation == Activation::kSilu ? kSiluLimit : kGeluLimit);
  const Vector<kWidth> t = magnitude < limit ? magnitude : limit;
  const Vector<kWidth> base = positive_part<kWidth>(x);  // NaN of minus infinity, as the formula
  if constexpr (kActivation == Activation::kGelu) {
    return subtract_gelu_tail<kWidth>(base, t);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return base - t * gelu_tanh_tail<kWidth>(t);
  } else {
    return base - t * silu_tail<kWidth>(t);
  }
}

// In these comparisons NaN is not less than anything, and stays.
template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> relu(Vector<kWidth> x) {
  return x < 0.0F ? Vector<kWidth>{} : x;
}

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> relu6(Vector<kWidth> x) {
  const Vector<kWidth> v = relu<kWidth>(x);
  return v > 6.0F ? broadcast<kWidth>(6.0F) : v;
}

template <Activation kActivation, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> activate(Vector<kWidth> x) {
  if constexpr (kActivation == Activation::kNone) {
    return x;
  } else if constexpr (kActivation == Activation::kRelu) {
    return relu<kWidth>(x);
  } else if constexpr (kActivation == Activation::kRelu6) {
    return relu6<kWidth>(x);
  } else if constexpr (kActivation == Activation::kHardswish) {
    return x * (relu6<kWidth>(x + 3.0F) * (1.0F / 6.0F));
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    return x < 0.0F ? 0.01F * x : x;
  } else {
    return gated<kActivation, kWidth>(x);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
