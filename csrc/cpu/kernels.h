// The interface between the drivers, compiled once, and the kernels, compiled once per ISA.
//
// Kernels take raw pointers, allocate nothing, throw nothing and know nothing of threads.
//
// Activations are float32 in blocks of kBlock channels, (channels / kBlock, pixels, kBlock): a
// register holds channels of one pixel whatever the image's size, and a store is contiguous.
// Channels beyond the last are zero, and stay zero, as their weights and vectors are.
#pragma once

#include <cstdint>

namespace convmixer_fast::cpu {

constexpr int kBlock = 16;
// Output channels whose weights of a product lie together.
constexpr int kPanel = 32;

// The numbers of convmixer_fast/activations.py; kNone is for a linear layer.
enum class Activation : int {
  kNone = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kRelu = 3,
  kSilu = 4,
  kRelu6 = 5,
  kHardswish = 6,
  kLeakyRelu = 7,
};
constexpr int kActivationCount = 8;

// What follows the convolution: act(v + bias) * scale + shift. Each is padded to whole panels.
struct Epilogue {
  const float* bias;
  const float* scale;
  const float* shift;
  Activation activation;
};

// y = act(depthwise_conv(x) + bias) * scale + shift (+ x) for the pixels [begin, end) of an image,
// in raster order, and all channels.
struct DepthwiseTile {
  const float* x;       // (blocks, height * width, kBlock)
  const float* weight;  // (blocks, kernel_size * kernel_size, kBlock)
  Epilogue epilogue;
  bool residual;
  int64_t blocks;
  int64_t height;
  int64_t width;
  int64_t kernel_size;  // odd
  int64_t begin;
  int64_t end;
  float* y;              // (blocks, ..., kBlock), from pixel `begin` on
  int64_t y_block_stride;  // floats
};

// z = act(weight * y + bias) * scale + shift for a number of pixels.
struct PointwiseTile {
  const float* y;          // (depth / kBlock, ..., kBlock), from the first pixel on
  int64_t y_block_stride;  // floats
  int64_t pixels;
  int64_t depth;        // input channels
  const float* weight;  // (panels, depth, kPanel)
  Epilogue epilogue;
  int64_t blocks;  // of output channels
  float* z;        // (blocks, ..., kBlock), from the first pixel on
  int64_t z_block_stride;
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  void (*depthwise_tile)(const DepthwiseTile& tile);
  void (*pointwise_tile)(const PointwiseTile& tile);
};

// The x86-64 ones exist on x86-64 only.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace convmixer_fast::cpu
