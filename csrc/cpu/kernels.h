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

// What follows the convolution: act(v * gain + bias) * scale + shift. Each is padded to whole panels.
// The gains are 1, or powers of two that undo the scaling of a product's operands (strassen_tile.h).
struct Epilogue {
  const float* bias;
  const float* scale;
  const float* shift;
  const float* gain;           // of the sum
  const float* residual_gain;  // of what a depthwise convolution adds
  Activation activation;

  // From a channel on, the first of a block.
  Epilogue from(int64_t channel) const {
    return {bias + channel, scale + channel,         shift + channel,
            gain + channel, residual_gain + channel, activation};
  }
};

// y = act(depthwise_conv(x) * gain + bias) * scale + shift (+ x * residual_gain) for the pixels
// [begin, end) of an image, in raster order, and all channels.
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

// z = act(weight * y * gain + bias) * scale + shift for a number of pixels.
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

// The same product by one level of Strassen's algorithm: 7 products of half the depth and half the
// channels for every 8 (in Winograd's form, with 15 sums of blocks). Pixels are taken in groups of
// at most 2 * tile_rows, whose first and last half are the two block rows; where a half is not a
// whole number, both have the pixel in the middle. A result depends on the group that its pixel is
// in, and so groups are the image's, whatever the tiles.
struct StrassenTile {
  PointwiseTile product;  // depth in whole pairs of blocks, channels in whole pairs of panels
  // weight: (panels / 2, 7, depth / 2, kPanel), of the blocks B of the transposed matrix: B11,
  // B21, B22, T4 = T2 - B21, T1 = B12 - B11, T2 = B22 - T1, T3 = B22 - B12.
  int64_t image_pixels;
  int64_t image_groups;
  int64_t first_group;
  int64_t last_group;  // the one behind
  float* scratch;      // strassen_scratch() floats

  // Of the tile's pixels, where the group begins.
  int64_t group_begin(int64_t group) const {
    return group * image_pixels / image_groups - first_group * image_pixels / image_groups;
  }
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  int64_t tile_rows;  // pixels of a product's register tile
  void (*depthwise_tile)(const DepthwiseTile& tile);
  void (*pointwise_tile)(const PointwiseTile& tile);
  void (*strassen_tile)(const StrassenTile& tile);
  int64_t (*strassen_scratch)(int64_t groups, int64_t depth);
};

// The x86-64 ones exist on x86-64 only.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace convmixer_fast::cpu
