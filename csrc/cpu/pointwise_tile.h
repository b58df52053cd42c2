// The matrix product under pointwise_block and patch_embed, with its epilogue.
//
// A register tile is up to kRows pixels by kVectors * kWidth output channels of one panel. Per
// step of the depth that many words of weights are loaded, and one word of each pixel is broadcast:
// a number of 32 bits, or four of 8 (arithmetic.h).
#pragma once

#include "arithmetic.h"
#include "epilogue.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int kPrefetchSteps = 8;
constexpr int64_t kLine = 64 / sizeof(Word);  // of a cache
constexpr int64_t kNearWords = 128 * 1024;    // weights of a layer that stay in an L2 cache

struct Product {
  const Word* y;  // the first pixel, in the first block of the piece of depth
  int64_t y_block_stride;
  int64_t depth;       // of the piece
  const Word* weight;  // (depth, kPanel), from the first channel on
  const float* sum_scale;  // of all channels; null where sums are not scaled
  int64_t channel;         // the first one
  bool accumulate;
  float* sums;  // (..., kBlock), one row a pixel
  const Word* next;    // what will be read next: brought into the L2 cache meanwhile,
  int64_t next_lines;  // so many lines with each block of the depth
};

using Multiply = void (*)(const Product& product);

template <class Arithmetic, int kRows, int kVectors, int kWidth>
__attribute__((noinline)) void multiply(const Product& product) {
  constexpr int kPerBlock = kBlock / kWidth;
  const auto sums_at = [&](int row, int v) {
    return product.sums + v / kPerBlock * kRows * kBlock + row * kBlock + v % kPerBlock * kWidth;
  };
  typename Arithmetic::Sum sum[kRows][kVectors] = {};
  const Word* weight = product.weight;
  const Word* y = product.y;
  const Word* next = product.next;
  for (int64_t begin = 0; begin < product.depth; begin += kBlock, y += product.y_block_stride) {
    const int64_t steps = smaller(kBlock, product.depth - begin);
    for (int64_t line = 0; line < product.next_lines; ++line, next += kLine) {
      __builtin_prefetch(next, 0, 2);
    }
    for (int64_t k = 0; k < steps; ++k, weight += kPanel) {
      typename Arithmetic::Words w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Arithmetic::load(weight + v * kWidth);
        __builtin_prefetch(weight + kPrefetchSteps * kPanel + v * kWidth);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const typename Arithmetic::Words value = Arithmetic::broadcast(y + row * kBlock + k);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[row][v] = Arithmetic::add_product(sum[row][v], value, w[v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<kWidth> value = Arithmetic::to_float(sum[row][v], product.sum_scale,
                                                    product.channel + v * kWidth);
      if (product.accumulate) value += load<kWidth>(sums_at(row, v));
      store<kWidth>(sums_at(row, v), value);
    }
  }
}

template <class Arithmetic, int kRows, int kVectors, int kWidth>
Multiply select_multiply(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return select_multiply<Arithmetic, kRows - 1, kVectors, kWidth>(rows);
  }
  return multiply<Arithmetic, kRows, kVectors, kWidth>;
}

// sums (columns / kBlock, rows, kBlock) = y (rows) * weight (depth, kPanel), for its first columns.
template <class Arithmetic, int kRows, int kVectors, int kWidth>
void multiply_rows(const Word* y, int64_t y_block_stride, int64_t depth, const Word* weight,
                   const float* sum_scale, int64_t channel, int64_t rows, int64_t columns,
                   float* sums, const Word* next, int64_t next_lines) {
  const Multiply multiply = select_multiply<Arithmetic, kRows, kVectors, kWidth>(rows);
  for (int64_t column = 0; column < columns; column += kVectors * kWidth) {
    Product product{};
    product.sums = sums + column / kBlock * rows * kBlock + column % kBlock;
    product.sum_scale = sum_scale;
    product.channel = channel + column;
    product.y_block_stride = y_block_stride;
    for (int64_t begin = 0; begin == 0 || begin < depth; begin += Arithmetic::kSumDepth) {
      product.y = y + begin / kBlock * y_block_stride;
      product.depth = smaller(Arithmetic::kSumDepth, depth - begin);
      product.weight = weight + begin * kPanel + column;
      product.accumulate = begin > 0;
      // Once for all columns.
      product.next = next + begin / kBlock * next_lines * kLine;
      product.next_lines = column == 0 ? next_lines : 0;
      multiply(product);
    }
  }
}

// Panels outside, pixels inside: a panel's weights stay in the cache while all pixels use them.
template <class Arithmetic, int kRows, int kVectors, int kWidth>
void pointwise_tile(const PointwiseTile& tile) {
  const Word* y = static_cast<const Word*>(tile.y);
  const Word* weight = static_cast<const Word*>(tile.weight);
  const Finish finish = select_finish<kWidth>(tile.epilogue.activation);
  const int64_t panels = (tile.blocks * kBlock + kPanel - 1) / kPanel;
  // Rows are shared out evenly, so that no small register tile is left over.
  const int64_t row_tiles = (tile.pixels + kRows - 1) / kRows;
  // While a panel is used the next one is brought near, a part of it with each row tile; what lies
  // behind the last one may be anything, as prefetching does not fault. Few weights stay near.
  const int64_t depth_blocks = (tile.depth + kBlock - 1) / kBlock;
  const bool few = panels * tile.depth * kPanel <= kNearWords;
  const int64_t next_lines = few ? 0 : (kPanel * kBlock / kLine + row_tiles - 1) / row_tiles;
  alignas(64) float sums[kPanel * kRows];
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t begin = i * tile.pixels / row_tiles;
      const int64_t end = (i + 1) * tile.pixels / row_tiles;
      const int64_t first_block = panel * (kPanel / kBlock);
      const int64_t blocks = smaller(kPanel / kBlock, tile.blocks - first_block);
      multiply_rows<Arithmetic, kRows, kVectors, kWidth>(
          y + begin * kBlock, tile.y_block_stride, tile.depth,
          weight + panel * tile.depth * kPanel, tile.sum_scale, panel * kPanel, end - begin,
          blocks * kBlock, sums,
          weight + (panel + 1) * tile.depth * kPanel + i * next_lines * depth_blocks * kLine,
          next_lines);
      for (int64_t block = 0; block < blocks; ++block) {
        finish(sums + block * (end - begin) * kBlock, end - begin,
               BlockEpilogue(tile.epilogue, first_block + block), nullptr,
               tile.z + (first_block + block) * tile.z_block_stride + begin * kBlock);
      }
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
