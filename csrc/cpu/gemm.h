// The matrix product under pointwise_block and patch_embed: register tiles with an epilogue.
//
// A tile is up to kTileRows rows (output channels) by one panel of kVectors * kWidth columns
// (pixels). Its sums stay in registers; per step of the depth one row of the packed panel is
// loaded and one weight per row broadcast.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// Sums are completed in pieces of this depth: one long chain of additions loses more digits.
constexpr int64_t kSumDepth = 256;

constexpr int64_t kPrefetchSteps = 8;

// tile (kRows, columns) += weight (depth, kRows)^T * panel (depth, columns).
template <int kRows, int kVectors, int kWidth>
__attribute__((noinline)) void multiply(const float* weight, const float* panel, int64_t depth,
                                        float* tile) {
  constexpr int kColumns = kVectors * kWidth;
  Vector<kWidth> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<kWidth> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = load<kWidth>(panel + v * kWidth);
      __builtin_prefetch(panel + kPrefetchSteps * kColumns + v * kWidth);
    }
    __builtin_prefetch(weight + kPrefetchSteps * kRows);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vector<kWidth> w = broadcast<kWidth>(weight[row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] += w * x[v];
    }
    weight += kRows;
    panel += kColumns;
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* target = tile + row * kColumns + v * kWidth;
      store<kWidth>(target, load<kWidth>(target) + sum[row][v]);
    }
  }
}

using Multiply = void (*)(const float* weight, const float* panel, int64_t depth, float* tile);

template <int kRows, int kVectors, int kWidth>
Multiply select_multiply(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return select_multiply<kRows - 1, kVectors, kWidth>(rows);
  }
  return multiply<kRows, kVectors, kWidth>;
}

// tile (rows, kColumns): the product plus bias. Row r is finished with the r-th scale and shift,
// and stored at out + r * out_stride, which may be the tile itself.
template <Activation kActivation, int kColumns, int kWidth>
__attribute__((noinline)) void finish_rows(const float* tile, const Epilogue& epilogue,
                                           int64_t row_begin, int64_t row_end, float* out,
                                           int64_t out_stride) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float scale = epilogue.scale[row];
    const float shift = epilogue.shift[row];
#pragma GCC unroll 4
    for (int column = 0; column < kColumns; column += kWidth) {
      const Vector<kWidth> v = activate<kActivation, kWidth>(load<kWidth>(tile + column));
      store<kWidth>(out + column, v * scale + shift);
    }
    tile += kColumns;
    out += out_stride;
  }
}

template <int kColumns, int kWidth>
void finish_rows(const float* tile, const Epilogue& epilogue, int64_t row_begin,
                 int64_t row_end, float* out, int64_t out_stride) {
  switch (epilogue.activation) {
    case Activation::kGelu:
      finish_rows<Activation::kGelu, kColumns, kWidth>(tile, epilogue, row_begin, row_end, out,
                                                       out_stride);
      break;
    case Activation::kGeluTanh:
      finish_rows<Activation::kGeluTanh, kColumns, kWidth>(tile, epilogue, row_begin, row_end,
                                                           out, out_stride);
      break;
    case Activation::kRelu:
      finish_rows<Activation::kRelu, kColumns, kWidth>(tile, epilogue, row_begin, row_end, out,
                                                       out_stride);
      break;
  }
}

template <int kTileRows, int kVectors, int kWidth>
void multiply_tile(const PatchProblem& problem, const float* packed_tile, int64_t row_begin,
                   int64_t row_end, const float* packed_panel, int64_t panel) {
  constexpr int kColumns = kVectors * kWidth;
  const int64_t rows = row_end - row_begin;
  alignas(64) float tile[kTileRows * kColumns];
  for (int64_t row = 0; row < rows; ++row) {
    fill<kWidth>(tile + row * kColumns, problem.epilogue.bias[row_begin + row], kColumns);
  }
  const Multiply multiply = select_multiply<kTileRows, kVectors, kWidth>(rows);
  for (int64_t begin = 0; begin < problem.depth; begin += kSumDepth) {
    multiply(packed_tile + begin * rows, packed_panel + begin * kColumns,
             smaller(kSumDepth, problem.depth - begin), tile);
  }

  const int64_t grid = problem.grid_h * problem.grid_w;
  const int64_t first = panel * kColumns;
  int64_t image = first / grid;
  int64_t pixel = first % grid;
  float* out = problem.out + (image * problem.rows + row_begin) * grid + pixel;
  if (pixel + kColumns <= grid) {
    finish_rows<kColumns, kWidth>(tile, problem.epilogue, row_begin, row_end, out, grid);
    return;
  }
  // The panel ends with the columns, or reaches into the next image.
  finish_rows<kColumns, kWidth>(tile, problem.epilogue, row_begin, row_end, tile, kColumns);
  const int64_t columns = smaller(kColumns, problem.columns - first);
  for (int64_t column = 0; column < columns; pixel = 0, ++image) {
    const int64_t run = smaller(columns - column, grid - pixel);
    out = problem.out + (image * problem.rows + row_begin) * grid + pixel;
    for (int64_t row = 0; row < rows; ++row) {
      copy_floats<kWidth>(out + row * grid, tile + row * kColumns + column, run);
    }
    column += run;
  }
}

// A cache line of each row at a time: where the depth is a power of two, as many rows as a tile
// has compete for one cache set, and a line would be gone before its second float is read.
inline void pack_weight_tile(const float* weight, int64_t depth, int64_t row_begin,
                             int64_t row_end, float* packed) {
  constexpr int64_t kLine = 16;
  const int64_t rows = row_end - row_begin;
  for (int64_t begin = 0; begin < depth; begin += kLine) {
    const int64_t end = smaller(begin + kLine, depth);
    for (int64_t row = 0; row < rows; ++row) {
      const float* source = weight + (row_begin + row) * depth;
      for (int64_t k = begin; k < end; ++k) packed[k * rows + row] = source[k];
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
