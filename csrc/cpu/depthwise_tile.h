// Depthwise convolution of a tile of pixels, with its epilogue.
//
// A strip is up to kColumns neighbouring pixels of one row and a block of channels, its sums in
// registers. For each kernel row the weights stay in registers, and each input vector is loaded
// once and used for all the pixels that it touches. Kernel rows outside the image are left out;
// strips near its left or right border look at each input column, others need not.
#pragma once

#include "epilogue.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

// Weights of at most this many neighbouring taps are held in registers; a longer kernel row is
// done in several segments.
constexpr int kMaxTaps = 9;

struct Strip {
  const float* x;       // the image's first pixel in the first kernel row that is inside
  int64_t row_stride;   // floats
  int64_t column;       // of the input under the segment's first tap, for the first pixel
  int64_t width;        // of the image
  const float* weight;  // of the segment's first tap in that kernel row
  int64_t weight_row_stride;
  int64_t kernel_rows;
  bool accumulate;
  float* sums;  // (kColumns, kBlock)
};

using Convolve = void (*)(const Strip& strip);

template <int kTaps, int kColumns, int kWidth, bool kBorder>
__attribute__((noinline)) void convolve(const Strip& strip) {
  for (int lane = 0; lane < kBlock; lane += kWidth) {
    Vector<kWidth> sum[kColumns] = {};
    if (strip.accumulate) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) sum[c] = load<kWidth>(strip.sums + c * kBlock + lane);
    }
    const float* x = strip.x + strip.column * kBlock + lane;
    const float* weight = strip.weight + lane;
    for (int64_t row = 0; row < strip.kernel_rows; ++row) {
      Vector<kWidth> taps[kTaps];
#pragma GCC unroll 16
      for (int tap = 0; tap < kTaps; ++tap) taps[tap] = load<kWidth>(weight + tap * kBlock);
#pragma GCC unroll 32
      for (int input = 0; input < kColumns + kTaps - 1; ++input) {
        if constexpr (kBorder) {
          const int64_t column = strip.column + input;
          if (column < 0 || column >= strip.width) continue;
        }
        const Vector<kWidth> v = load<kWidth>(x + input * kBlock);
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) {
          const int tap = input - c;
          if (tap >= 0 && tap < kTaps) sum[c] += taps[tap] * v;
        }
      }
      x += strip.row_stride;
      weight += strip.weight_row_stride;
    }
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) store<kWidth>(strip.sums + c * kBlock + lane, sum[c]);
  }
}

template <int kTaps, int kColumns, int kWidth>
Convolve select_convolve(int64_t taps, bool border) {
  if constexpr (kTaps > 1) {
    if (taps < kTaps) return select_convolve<kTaps - 1, kColumns, kWidth>(taps, border);
  }
  return border ? convolve<kTaps, kColumns, kWidth, true>
                : convolve<kTaps, kColumns, kWidth, false>;
}

// Strips of `columns` pixels: the most that registers hold, or fewer where there are no more.
template <int kColumns, int kWidth>
class DepthwiseRows {
 public:
  explicit DepthwiseRows(const DepthwiseTile& tile)
      : tile_(tile),
        radius_(tile.kernel_size / 2),
        segments_((tile.kernel_size + kMaxTaps - 1) / kMaxTaps),
        finish_(select_finish<kWidth>(tile.epilogue.activation)) {}

  // Pixels [column, end) of a row, at most kColumns of them being stored.
  void strip(int64_t block, int64_t row, int64_t column, int64_t end) const {
    const int64_t size = tile_.kernel_size;
    const int64_t top = larger(0, radius_ - row);
    const float* plane = tile_.x + block * tile_.height * tile_.width * kBlock;
    const int64_t row_stride = tile_.width * kBlock;
    const int64_t first = column - radius_;
    const bool border = first < 0 || column + kColumns + radius_ > tile_.width;
    alignas(64) float sums[kColumns * kBlock];
    Strip strip{};
    strip.x = plane + (row + top - radius_) * row_stride;
    strip.row_stride = row_stride;
    strip.width = tile_.width;
    strip.weight_row_stride = size * kBlock;
    strip.kernel_rows = smaller(size, tile_.height + radius_ - row) - top;
    strip.sums = sums;
    for (int64_t segment = 0; segment < segments_; ++segment) {
      const int64_t tap = segment * size / segments_;
      const int64_t taps = (segment + 1) * size / segments_ - tap;
      strip.column = first + tap;
      strip.weight = tile_.weight + ((block * size + top) * size + tap) * kBlock;
      strip.accumulate = segment > 0;
      select_convolve<kMaxTaps, kColumns, kWidth>(taps, border)(strip);
    }
    const int64_t pixel = row * tile_.width + column;
    finish_(sums, smaller(kColumns, end - column), BlockEpilogue(tile_.epilogue, block),
            tile_.residual ? plane + pixel * kBlock : nullptr,
            tile_.y + block * tile_.y_block_stride + (pixel - tile_.begin) * kBlock);
  }

 private:
  const DepthwiseTile& tile_;
  int64_t radius_;
  int64_t segments_;
  Finish finish_;
};

// Pixels [begin, end) of one row. The last strip overlaps its neighbour instead of being
// shorter: it computes the same values again.
template <int kColumns, int kWidth>
void depthwise_row(const DepthwiseTile& tile, int64_t block, int64_t row, int64_t begin,
                   int64_t end) {
  if constexpr (kColumns > 4) {
    if (end - begin <= kColumns / 2) {
      depthwise_row<kColumns / 2, kWidth>(tile, block, row, begin, end);
      return;
    }
  }
  const DepthwiseRows<kColumns, kWidth> rows(tile);
  for (int64_t column = begin; column < end; column += kColumns) {
    rows.strip(block, row, larger(begin, smaller(column, end - kColumns)), end);
  }
}

template <int kColumns, int kWidth>
void depthwise_tile(const DepthwiseTile& tile) {
  for (int64_t block = 0; block < tile.blocks; ++block) {
    int64_t row = tile.begin / tile.width;
    int64_t column = tile.begin % tile.width;
    for (int64_t pixel = tile.begin; pixel < tile.end; ++row, column = 0) {
      const int64_t end = smaller(tile.width, column + tile.end - pixel);
      depthwise_row<kColumns, kWidth>(tile, block, row, column, end);
      pixel += end - column;
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
