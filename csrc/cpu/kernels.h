// The interface between the drivers, compiled once, and the kernels, compiled once per ISA.
//
// Kernels take raw pointers, allocate nothing, throw nothing and know nothing of threads.
//
// Activations are float32 in blocks of kBlock channels, (channels / kBlock, pixels, kBlock): a
// register holds channels of one pixel whatever the image's size, and a store is contiguous.
// Channels beyond the last are zero, and stay zero, as their weights and vectors are.
//
// What a product of smaller numbers reads has two or four channels to a word of 32 bits instead, one
// of each of so many blocks: (channels / (2 * kBlock), pixels, kBlock) words of bfloat16, or
// (channels / (4 * kBlock), pixels, kBlock) words of 8-bit numbers. So all strides are in words.
#pragma once

#include <cstdint>

namespace convmixer_fast::cpu {

constexpr int kBlock = 16;
// Output channels whose weights of a product lie together.
constexpr int kPanel = 32;
// What a product takes; the value is how many numbers make a word.
enum class Format : int { kFloat32 = 1, kBfloat16 = 2, kInt8 = 4 };

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

  Epilogue from_block(int64_t block) const {
    return {bias + block * kBlock, scale + block * kBlock, shift + block * kBlock, activation};
  }
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
//
// Of 8 bits, y are unsigned and weights signed numbers, these of at most 64 in size, and the product
// of integers times sum_scale takes the place of weight * y.
struct PointwiseTile {
  const void* y;           // (depth / kBlock, ..., kBlock) words, from the first pixel on
  int64_t y_block_stride;  // words
  int64_t pixels;
  int64_t depth;       // words: input channels, or where several make a word those of whole blocks
  const void* weight;  // (panels, depth, kPanel) words
  const float* sum_scale;  // 8 bits only: of each output channel, padded as the epilogue's
  Epilogue epilogue;
  int64_t blocks;  // of output channels
  float* z;        // (blocks, ..., kBlock), from the first pixel on
  int64_t z_block_stride;
};

// Words of smaller numbers: bfloat16, or round(y * inverse_scale) + zero, from 0 to 255. Halves are
// rounded to even.
struct ConvertTile {
  const float* y;          // (blocks, ..., kBlock), from the first pixel on
  int64_t y_block_stride;  // floats
  int64_t pixels;
  int64_t blocks;
  float inverse_scale;
  float zero;
  void* out;  // (blocks / numbers of a word, ..., kBlock) words; numbers of no block are 0
  int64_t out_block_stride;  // words
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;
  void (*depthwise_tile)(const DepthwiseTile& tile);
  void (*pointwise_tile)(const PointwiseTile& tile);
  void (*int8_tile)(const ConvertTile& tile);
  void (*pointwise_int8_tile)(const PointwiseTile& tile);
  // These are null where there are no instructions for them.
  void (*bfloat16_tile)(const ConvertTile& tile);
  void (*pointwise_bfloat16_tile)(const PointwiseTile& tile);
  // Multiplications and additions a second of the calling thread at most, measured when called; 0
  // where there are no instructions for the format.
  double (*rate)(Format format);
};

// The x86-64 ones exist on x86-64 only.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
// The former ones, products of smaller numbers by the instructions for them.
const Kernels* avx2_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace convmixer_fast::cpu
