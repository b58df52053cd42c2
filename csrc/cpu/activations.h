// The activations on vectors, with PyTorch's treatment of NaN and infinities.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// Both forms of GELU are x * P(x) with P(-x) = 1 - P(x), hence relu(x) - t * Q(t) with
// t = |x| and the tail probability Q = 1 - P. Q falls from 1/2 like exp(-t^2 / 2); its eighth
// root is so flat that a short polynomial approximates it, and the eighth power of that has
// neither a division nor cancellation. Beyond kLimit the term is below 5e-8 and stays
// constant. The coefficients minimise the largest error of t * Q(t).
struct GeluErfTail {  // P is the normal distribution function; error 2.5e-7
  static constexpr float kLimit = 6.0F;
  static constexpr int kDegree = 8;
  static constexpr float kCoefficients[kDegree + 1] = {
      9.170039892e-1F,  -9.145711362e-2F, -3.192940354e-2F, -6.692304742e-4F, 1.501378836e-3F,
      3.613432636e-5F, -6.089423914e-5F, 7.594372619e-6F,  -3.042388244e-7F};
};

struct GeluTanhTail {  // P is (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2; error 3.2e-7
  static constexpr float kLimit = 5.25F;
  static constexpr int kDegree = 9;
  static constexpr float kCoefficients[kDegree + 1] = {
      9.170027971e-1F,  -9.143508971e-2F, -3.206813708e-2F, -1.766662026e-4F, 8.633354446e-4F,
      6.920747692e-4F, -4.546662676e-4F, 1.178781022e-4F,  -1.456742302e-5F, 7.003336577e-7F};
};

template <typename Tail, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> gelu(Vector<kWidth> x) {
  const Vector<kWidth> magnitude = absolute<kWidth>(x);
  const Vector<kWidth> limit = broadcast<kWidth>(Tail::kLimit);
  const Vector<kWidth> t = magnitude < limit ? magnitude : limit;
  Vector<kWidth> root = broadcast<kWidth>(Tail::kCoefficients[Tail::kDegree]);
  for (int i = Tail::kDegree - 1; i >= 0; --i) root = root * t + Tail::kCoefficients[i];
  const Vector<kWidth> squared = root * root;
  const Vector<kWidth> fourth = squared * squared;
  // x - x rather than 0: it keeps NaN, and makes NaN of minus infinity, as the formula does.
  const Vector<kWidth> positive_part = x > 0.0F ? x : x - x;
  return positive_part - t * (fourth * fourth);
}

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> relu(Vector<kWidth> x) {
  return x < 0.0F ? Vector<kWidth>{} : x;  // NaN is not less than 0 and stays
}

template <Activation kActivation, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> activate(Vector<kWidth> x) {
  if constexpr (kActivation == Activation::kGelu) {
    return gelu<GeluErfTail, kWidth>(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu<GeluTanhTail, kWidth>(x);
  } else {
    return relu<kWidth>(x);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
