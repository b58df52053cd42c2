// The interface between the drivers, compiled once, and the kernels, compiled once per ISA.
//
// Kernels take raw pointers, allocate nothing, throw nothing and know nothing of threads.
// All tensors are float32, contiguous NCHW.
#pragma once

#include <cstdint>

namespace convmixer_fast::cpu {

enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2 };
constexpr int kActivationCount = 3;

// What follows the convolution: act(y + bias) * scale + shift. No pointer is null.
struct Epilogue {
  const float* bias;
  const float* scale;
  const float* shift;
  Activation activation;
};

// out = act(depthwise_conv(x, weight) + bias) * scale + shift (+ x).
//
// A plane is one channel of one image. It is worked on in bands of rows, so that a band
// with its halo fits in the cache however large the image is.
struct DepthwiseProblem {
  const float* x;       // (planes, height, width)
  const float* weight;  // (channels, kernel_size, kernel_size)
  float* out;           // (planes, height, width)
  Epilogue epilogue;
  bool residual;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t kernel_size;
  int64_t band_height;
  int64_t bands;  // per plane
};

// out[n] = act(weight (rows, depth) * columns(x[n]) + bias) * scale + shift: a product whose
// columns are the patches of all images, one after the other. A pointwise convolution is the
// case of 1 x 1 patches.
struct PatchProblem {
  const float* x;  // (images, channels, height, width)
  float* out;      // (images, rows, grid_h, grid_w)
  Epilogue epilogue;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t patch_h;
  int64_t patch_w;
  int64_t grid_h;   // height / patch_h
  int64_t grid_w;   // width / patch_w
  int64_t rows;     // output channels
  int64_t depth;    // channels * patch_h * patch_w
  int64_t columns;  // images * grid_h * grid_w
};

// The kernels of one ISA.
struct Kernels {
  const char* isa;

  // Floats of scratch that depthwise_bands needs.
  int64_t (*depthwise_scratch)(const DepthwiseProblem& problem);
  // Computes the bands [begin, end), counted over all planes.
  void (*depthwise_bands)(const DepthwiseProblem& problem, int64_t begin, int64_t end,
                          float* scratch);

  // A product is made in tiles of at most tile_rows rows by one panel of panel_columns
  // columns. Packed weights are row tiles, one after the other, each (depth, its rows); a
  // packed panel is (depth, panel_columns).
  int64_t tile_rows;
  int64_t panel_columns;
  // Packs weight rows [row_begin, row_end), one tile, of a (rows, depth) matrix.
  void (*pack_weight_tile)(const float* weight, int64_t depth, int64_t row_begin,
                           int64_t row_end, float* packed);
  // Packs `panels` consecutive panels, zero-filled beyond the last column: pack_pixels for
  // patches of 1 x 1, pack_patches for any.
  void (*pack_pixels)(const PatchProblem& problem, int64_t first_panel, int64_t panels,
                      float* packed);
  void (*pack_patches)(const PatchProblem& problem, int64_t first_panel, int64_t panels,
                       float* packed);
  // Computes rows [row_begin, row_end), one tile, of one panel, and stores the result.
  void (*multiply_tile)(const PatchProblem& problem, const float* packed_tile,
                        int64_t row_begin, int64_t row_end, const float* packed_panel,
                        int64_t panel);
};

// The x86-64 ones exist on x86-64 only.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace convmixer_fast::cpu
