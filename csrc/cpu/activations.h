// The activations on vectors, with PyTorch's treatment of NaN and infinities.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// Both forms of GELU are x * (1 + E(x)) / 2 with an odd E that goes from -1 to 1. With t = |x| and
// Q(t) = (1 - E(t)) / 2 that is relu(x) - t * Q(t), which keeps the digits of large x.
//
// Up to kCentre, E(t) is t times a ratio of polynomials in t^2: accurate to the last digits of
// small results too. That matters, as the BatchNorm behind a channel of small results has a
// large scale. Above, where 1 - E would cancel, Q falls like exp(-t^2 / 2); its eighth root is
// so flat that a short polynomial approximates it. Beyond kLimit the term is below 5e-8 and
// stays constant.
constexpr float kCentre = 2.0F;
constexpr int kRatioDegree = 3;

struct GeluErf {  // E is erf(x / sqrt(2))
  static constexpr float kNumerator[kRatioDegree + 1] = {7.978845834732056e-1F, 4.492251202464104e-2F,
                                                         6.248553283512592e-3F,
                                                         1.7378362827003002e-5F};
  static constexpr float kDenominator[kRatioDegree + 1] = {
      1.0F, 2.2296875715255737e-1F, 1.999254897236824e-2F, 7.564017432741821e-4F};
  static constexpr float kLimit = 6.0F;
  static constexpr int kDegree = 8;
  static constexpr float kRoot[kDegree + 1] = {
      9.170039892e-1F,  -9.145711362e-2F, -3.192940354e-2F, -6.692304742e-4F, 1.501378836e-3F,
      3.613432636e-5F, -6.089423914e-5F, 7.594372619e-6F,  -3.042388244e-7F};
};

struct GeluTanh {  // E is tanh(sqrt(2 / pi) * (x + 0.044715 x^3))
  static constexpr float kNumerator[kRatioDegree + 1] = {
      7.978845834732056e-1F, 3.526252508163452e-2F, 3.185728332027793e-3F, -6.370792107190937e-5F};
  static constexpr float kDenominator[kRatioDegree + 1] = {
      1.0F, 2.1168671548366547e-1F, 1.3876477256417274e-2F, -5.214084740146063e-5F};
  static constexpr float kLimit = 5.25F;
  static constexpr int kDegree = 9;
  static constexpr float kRoot[kDegree + 1] = {
      9.170027971e-1F,  -9.143508971e-2F, -3.206813708e-2F, -1.766662026e-4F, 8.633354446e-4F,
      6.920747692e-4F, -4.546662676e-4F, 1.178781022e-4F,  -1.456742302e-5F, 7.003336577e-7F};
};

template <int kWidth, int kTerms>
CONVMIXER_FAST_INLINE Vector<kWidth> polynomial(const float (&coefficients)[kTerms],
                                                Vector<kWidth> u) {
  Vector<kWidth> value = broadcast<kWidth>(coefficients[kTerms - 1]);
  for (int i = kTerms - 2; i >= 0; --i) value = value * u + coefficients[i];
  return value;
}

template <typename Form, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> gelu(Vector<kWidth> x) {
  const Vector<kWidth> magnitude = absolute<kWidth>(x);
  const Vector<kWidth> limit = broadcast<kWidth>(Form::kLimit);
  const Vector<kWidth> t = magnitude < limit ? magnitude : limit;

  const Vector<kWidth> u = t * t;
  const Vector<kWidth> ratio =
      polynomial<kWidth>(Form::kNumerator, u) / polynomial<kWidth>(Form::kDenominator, u);
  const Vector<kWidth> centre = 0.5F - 0.5F * t * ratio;

  const Vector<kWidth> root = polynomial<kWidth>(Form::kRoot, t);
  const Vector<kWidth> squared = root * root;
  const Vector<kWidth> fourth = squared * squared;
  const Vector<kWidth> tail = fourth * fourth;

  // x - x rather than 0: it keeps NaN, and makes NaN of minus infinity, as the formula does.
  const Vector<kWidth> positive_part = x > 0.0F ? x : x - x;
  return positive_part - t * (t < kCentre ? centre : tail);
}

template <int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> relu(Vector<kWidth> x) {
  return x < 0.0F ? Vector<kWidth>{} : x;  // NaN is not less than 0 and stays
}

template <Activation kActivation, int kWidth>
CONVMIXER_FAST_INLINE Vector<kWidth> activate(Vector<kWidth> x) {
  if constexpr (kActivation == Activation::kGelu) {
    return gelu<GeluErf, kWidth>(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu<GeluTanh, kWidth>(x);
  } else {
    return relu<kWidth>(x);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
