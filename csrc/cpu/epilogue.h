// What follows a convolution, on sums that lie in a small buffer.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// The vectors of one block of channels.
struct BlockEpilogue {
  BlockEpilogue(const Epilogue& epilogue, int64_t block)
      : bias(epilogue.bias + block * kBlock),
        scale(epilogue.scale + block * kBlock),
        shift(epilogue.shift + block * kBlock) {}

  const float* bias;
  const float* scale;
  const float* shift;
};

// out (pixels, kBlock) = act(sums + bias) * scale + shift (+ residual, which may be null).
using Finish = void (*)(const float* sums, int64_t pixels, const BlockEpilogue& epilogue,
                        const float* residual, float* out);

template <Activation kActivation, int kWidth>
__attribute__((noinline)) void finish(const float* sums, int64_t pixels,
                                      const BlockEpilogue& epilogue, const float* residual,
                                      float* out) {
  for (int lane = 0; lane < kBlock; lane += kWidth) {
    const Vector<kWidth> bias = load<kWidth>(epilogue.bias + lane);
    const Vector<kWidth> scale = load<kWidth>(epilogue.scale + lane);
    const Vector<kWidth> shift = load<kWidth>(epilogue.shift + lane);
    for (int64_t at = lane; at < pixels * kBlock; at += kBlock) {
      Vector<kWidth> v = activate<kActivation, kWidth>(load<kWidth>(sums + at) + bias);
      v = v * scale + shift;
      if (residual != nullptr) v += load<kWidth>(residual + at);
      store<kWidth>(out + at, v);
    }
  }
}

template <int kWidth>
Finish select_finish(Activation activation) {
  switch (activation) {
    case Activation::kGelu: return finish<Activation::kGelu, kWidth>;
    case Activation::kGeluTanh: return finish<Activation::kGeluTanh, kWidth>;
    case Activation::kRelu: return finish<Activation::kRelu, kWidth>;
    case Activation::kSilu: return finish<Activation::kSilu, kWidth>;
    case Activation::kRelu6: return finish<Activation::kRelu6, kWidth>;
    case Activation::kHardswish: return finish<Activation::kHardswish, kWidth>;
    case Activation::kLeakyRelu: return finish<Activation::kLeakyRelu, kWidth>;
    case Activation::kNone: break;
  }
  return finish<Activation::kNone, kWidth>;
}

}  // namespace
}  // namespace convmixer_fast::cpu
