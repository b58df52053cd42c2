// A whole ConvMixer trunk, and its ops one by one, on raw float32 tensors.
//
// Nothing is checked: bindings.cpp does. Weights are packed (kernels.h): depthwise ones
// (blocks, kernel_size^2, kBlock), products' (panels, words of depth, kPanel) words, vectors to whole
// panels.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace convmixer_fast::cpu {

// What a product computes with. Of 8 bits: how its input becomes such numbers, round(y *
// inverse_scale) + zero, and what their product with the weights is to be multiplied by; the
// epilogue's bias makes up for zero.
struct Numbers {
  Format format = Format::kFloat32;
  float inverse_scale = 1;
  float zero = 0;
  const float* sum_scale = nullptr;  // of each output channel

  // Blocks of channels that make one.
  int64_t group() const { return static_cast<int64_t>(format); }
};

// act(product with weight) * scale + shift: a pointwise convolution, or the patch embedding.
struct ProductBlock {
  const void* weight;
  Epilogue epilogue;
  int64_t channels_out;
  Numbers numbers;
};

struct DepthwiseBlock {
  const float* weight;
  Epilogue epilogue;
  bool residual;
  int64_t channels;
  int64_t kernel_size;
};

struct Layer {
  DepthwiseBlock depthwise;
  ProductBlock pointwise;
};

struct Trunk {
  ProductBlock stem;
  std::vector<Layer> layers;
  std::optional<ProductBlock> head;

  // Of the stem, which is step 0, or of a layer.
  int64_t channels_of(size_t step) const {
    return step == 0 ? stem.channels_out : layers[step - 1].pointwise.channels_out;
  }
  int64_t channels_out() const { return channels_of(layers.size()); }
};

enum class Result { kFeatures, kMean, kLogits };

// Images (images, patches.channels, patches.height, patches.width) to the last layer's output,
// (images, channels, rows, columns), to its mean over the positions, (images, channels), or to
// what the head makes of that, (images, head->channels_out).
//
// Results do not depend on the number of threads. Each image of a large batch is computed by one
// thread; what does not go round is shared by all, tile by tile.
void run_trunk(const Trunk& trunk, const float* images, int64_t count, const Patches& patches,
               Result result, float* out, int threads);

// The outputs of chosen steps, (images, channels, rows, columns): outs[step] is where they go, null
// for nowhere; the steps after the last of `outs` are not run. The same bits as run_trunk's.
void run_intermediates(const Trunk& trunk, const float* images, int64_t count,
                       const Patches& patches, const std::vector<float*>& outs, int threads);

// A matrix (rows, depth) as the kernels read weights: (rows / lanes, depth, lanes), the rows beyond
// the last becoming zero.
void pack(const float* matrix, int64_t rows, int64_t depth, int64_t lanes, float* packed,
          int threads);

void run_depthwise(const DepthwiseBlock& block, const float* x, int64_t images, int64_t height,
                   int64_t width, float* out, int threads);

// A pointwise convolution is the case of patches of 1 x 1.
void run_product(const ProductBlock& block, const float* x, int64_t images,
                 const Patches& patches, float* out, int threads);

}  // namespace convmixer_fast::cpu
