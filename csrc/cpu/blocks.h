// The fused ops on raw float32 tensors, contiguous NCHW. They check nothing: bindings.cpp does.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace convmixer_fast::cpu {

// Per-channel vectors of an op; null for a bias or shift of 0 and a scale of 1.
struct ChannelVectors {
  const float* bias;
  const float* scale;
  const float* shift;
};

struct ImageShape {
  int64_t images;
  int64_t channels;
  int64_t height;
  int64_t width;
};

// act(depthwise_conv(x, weight) + bias) * scale + shift (+ x), zero-padded to the same size.
//   x, out: shape; weight: (channels, kernel_size, kernel_size), kernel_size odd.
void depthwise_block(const float* x, const float* weight, float* out, const ImageShape& shape,
                     int64_t kernel_size, const ChannelVectors& vectors, Activation activation,
                     bool residual, int threads);

// act(pointwise_conv(x, weight) + bias) * scale + shift.
//   x: shape; weight: (channels_out, shape.channels); out: (images, channels_out, h, w).
void pointwise_block(const float* x, const float* weight, float* out, const ImageShape& shape,
                     int64_t channels_out, const ChannelVectors& vectors, Activation activation,
                     int threads);

// act(patch_conv(x, weight) + bias) * scale + shift, the stride being the patch's size.
//   x: shape; weight: (channels_out, shape.channels, patch_h, patch_w);
//   out: (images, channels_out, height / patch_h, width / patch_w).
void patch_embed(const float* x, const float* weight, float* out, const ImageShape& shape,
                 int64_t channels_out, int64_t patch_h, int64_t patch_w,
                 const ChannelVectors& vectors, Activation activation, int threads);

}  // namespace convmixer_fast::cpu
