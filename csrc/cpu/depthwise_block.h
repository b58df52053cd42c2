// Depthwise convolution of planes, with its epilogue.
//
// A band of a plane is copied into scratch with a halo of zeros, so that no tile needs to know
// of borders. A tile is kRows x kWidth outputs: for each kernel column its weights stay in
// registers, and each input vector is loaded once and used for every output row that it
// touches. The last tile of a row or column overlaps its neighbour instead of being smaller:
// it computes the same values again.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int kMaxTileRows = 8;

// tile (kRows, kWidth) = convolution at `halo`, the tile's top left input.
using ConvolveTile = void (*)(const float* halo, int64_t stride, const float* weight,
                              int64_t kernel_size, float* tile);

template <int kKernelSize, int kRows, int kWidth>
__attribute__((noinline)) void convolve_tile(const float* halo, int64_t stride,
                                             const float* weight, int64_t, float* tile) {
  Vector<kWidth> sum[kRows] = {};
  for (int kw = 0; kw < kKernelSize; ++kw) {
    Vector<kWidth> column[kKernelSize];
#pragma GCC unroll 16
    for (int kh = 0; kh < kKernelSize; ++kh) {
      column[kh] = broadcast<kWidth>(weight[kh * kKernelSize + kw]);
    }
#pragma GCC unroll 32
    for (int input_row = 0; input_row < kRows + kKernelSize - 1; ++input_row) {
      const Vector<kWidth> v = load<kWidth>(halo + input_row * stride + kw);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const int kh = input_row - row;
        if (kh >= 0 && kh < kKernelSize) sum[row] += column[kh] * v;
      }
    }
  }
  for (int row = 0; row < kRows; ++row) store<kWidth>(tile + row * kWidth, sum[row]);
}

template <int kRows, int kWidth>
__attribute__((noinline)) void convolve_tile_any_size(const float* halo, int64_t stride,
                                                      const float* weight, int64_t kernel_size,
                                                      float* tile) {
  Vector<kWidth> sum[kRows] = {};
  for (int64_t kw = 0; kw < kernel_size; ++kw) {
    for (int64_t kh = 0; kh < kernel_size; ++kh) {
      const Vector<kWidth> w = broadcast<kWidth>(weight[kh * kernel_size + kw]);
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        sum[row] += w * load<kWidth>(halo + (kh + row) * stride + kw);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) store<kWidth>(tile + row * kWidth, sum[row]);
}

template <int kRows, int kWidth>
ConvolveTile select_convolve_tile(int64_t kernel_size) {
  switch (kernel_size) {
    case 3: return convolve_tile<3, kRows, kWidth>;
    case 5: return convolve_tile<5, kRows, kWidth>;
    case 7: return convolve_tile<7, kRows, kWidth>;
    case 9: return convolve_tile<9, kRows, kWidth>;
    default: return convolve_tile_any_size<kRows, kWidth>;
  }
}

// Where a tile goes. Rows of a tile wider than the plane are stored whole where they spill into
// rows of the tile that are written afterwards, and cut to `columns` otherwise.
struct TileTarget {
  float bias;
  float scale;
  float shift;
  const float* residual;  // null for none
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  int64_t whole_rows;
  int64_t columns;
};

using FinishTile = void (*)(const float* tile, const TileTarget& target);

template <Activation kActivation, int kRows, int kWidth>
__attribute__((noinline)) void finish_tile(const float* tile, const TileTarget& target) {
  const Vector<kWidth> bias = broadcast<kWidth>(target.bias);
  const Vector<kWidth> scale = broadcast<kWidth>(target.scale);
  const Vector<kWidth> shift = broadcast<kWidth>(target.shift);
  const float* residual = target.residual;
  const int64_t residual_stride = target.residual_stride;
  float* out = target.out;
  const int64_t out_stride = target.out_stride;
  const int64_t whole_rows = target.whole_rows;
  for (int row = 0; row < kRows; ++row) {
    Vector<kWidth> v = load<kWidth>(tile + row * kWidth) + bias;
    v = activate<kActivation, kWidth>(v) * scale + shift;
    if (residual != nullptr) v += load<kWidth>(residual + row * residual_stride);
    if (row < whole_rows) {
      store<kWidth>(out + row * out_stride, v);
    } else {
      alignas(64) float whole[kWidth];
      store<kWidth>(whole, v);
      copy_floats<kWidth>(out + row * out_stride, whole, target.columns);
    }
  }
}

template <int kRows, int kWidth>
FinishTile select_finish_tile(Activation activation) {
  switch (activation) {
    case Activation::kGelu: return finish_tile<Activation::kGelu, kRows, kWidth>;
    case Activation::kGeluTanh: return finish_tile<Activation::kGeluTanh, kRows, kWidth>;
    default: return finish_tile<Activation::kRelu, kRows, kWidth>;
  }
}

// The haloed copy of a band. The plane's columns begin at a cache line.
struct Halo {
  explicit Halo(const DepthwiseProblem& problem)
      : radius(problem.kernel_size / 2), first_column((radius + kLine - 1) / kLine * kLine) {
    // An odd number of lines, so that the rows of a tile do not compete for one cache set.
    const int64_t lines = (first_column + problem.width + radius + kLine - 1) / kLine;
    stride = (lines | 1) * kLine;
    // A tile wider than the plane reads one line more.
    floats = (problem.band_height + 2 * radius) * stride + kLine;
  }

  static constexpr int64_t kLine = 16;
  int64_t radius;
  int64_t first_column;
  int64_t stride;
  int64_t floats;
};

// Bands that are loaded together, then computed: a load that follows a store of other width to
// the same place too soon has to wait.
constexpr int64_t kGroupFloats = 4096;
constexpr int64_t kMaxGroup = 8;

inline int64_t group_size(const Halo& halo) {
  return larger(1, smaller(kMaxGroup, kGroupFloats / halo.floats));
}

inline int64_t depthwise_scratch(const DepthwiseProblem& problem) {
  const Halo halo(problem);
  return group_size(halo) * halo.floats;
}

// One band of one plane, and the step to the next without a division.
class Band {
 public:
  Band(const DepthwiseProblem& problem, int64_t index)
      : problem_(problem),
        plane_(index / problem.bands),
        channel_(plane_ % problem.channels),
        first_row_(index % problem.bands * problem.band_height) {}

  void advance() {
    first_row_ += problem_.band_height;
    if (first_row_ < problem_.height) return;
    first_row_ = 0;
    ++plane_;
    if (++channel_ == problem_.channels) channel_ = 0;
  }

  int64_t channel() const { return channel_; }
  int64_t first_row() const { return first_row_; }
  int64_t rows() const { return smaller(problem_.band_height, problem_.height - first_row_); }
  // Where the plane begins in a tensor of planes.
  int64_t offset() const { return plane_ * problem_.height * problem_.width; }

 private:
  const DepthwiseProblem& problem_;
  int64_t plane_;
  int64_t channel_;
  int64_t first_row_;
};

template <int kWidth>
class DepthwiseBands {
 public:
  DepthwiseBands(const DepthwiseProblem& problem, float* scratch)
      : problem_(problem), halo_(problem), scratch_(scratch) {
    fill<kWidth>(scratch, 0.0F, depthwise_scratch(problem));
  }

  void compute(int64_t begin, int64_t end) const {
    const int64_t group = group_size(halo_);
    Band to_load(problem_, begin);
    Band to_compute = to_load;
    for (; begin < end; begin += group) {
      const int64_t floats = smaller(group, end - begin) * halo_.floats;
      for (int64_t at = 0; at < floats; at += halo_.floats, to_load.advance()) {
        load_band(to_load, scratch_ + at);
      }
      for (int64_t at = 0; at < floats; at += halo_.floats, to_compute.advance()) {
        compute_band(to_compute, scratch_ + at);
      }
    }
  }

 private:
  // Only the plane's columns are written: those beside them stay zero.
  void load_band(const Band& band, float* scratch) const {
    const int64_t width = problem_.width;
    const int64_t begin = band.first_row() - halo_.radius;
    const int64_t end = band.first_row() + band.rows() + halo_.radius;
    const int64_t inside_begin = larger(begin, 0);
    const int64_t inside_end = smaller(end, problem_.height);
    const float* x = problem_.x + band.offset() + inside_begin * width;
    float* target = scratch + halo_.first_column;
    if (problem_.bands > 1) {  // otherwise these rows are zero already
      for (int64_t row = begin; row < inside_begin; ++row) {
        fill<kWidth>(target + (row - begin) * halo_.stride, 0.0F, width);
      }
      for (int64_t row = inside_end; row < end; ++row) {
        fill<kWidth>(target + (row - begin) * halo_.stride, 0.0F, width);
      }
    }
    target += (inside_begin - begin) * halo_.stride;
    for (int64_t row = inside_begin; row < inside_end; ++row) {
      copy_floats<kWidth>(target, x, width);
      target += halo_.stride;
      x += width;
    }
  }

  void compute_band(const Band& band, const float* scratch) const {
    if (band.rows() >= kMaxTileRows) {
      compute_tiles<kMaxTileRows>(band, scratch);
    } else if (band.rows() >= 4) {
      compute_tiles<4>(band, scratch);
    } else {
      compute_tiles<1>(band, scratch);
    }
  }

  template <int kRows>
  void compute_tiles(const Band& band, const float* scratch) const {
    const int64_t size = problem_.kernel_size;
    const int64_t width = problem_.width;
    const int64_t rows = band.rows();
    const int64_t channel = band.channel();
    const Epilogue& epilogue = problem_.epilogue;
    const ConvolveTile convolve = select_convolve_tile<kRows, kWidth>(size);
    const FinishTile finish = select_finish_tile<kRows, kWidth>(epilogue.activation);
    const float* weight = problem_.weight + channel * size * size;
    float* out = problem_.out + band.offset() + band.first_row() * width;
    // A row that spills ends within the next one, or the tile is cut in every row.
    const int64_t whole_rows = width >= kWidth ? kRows : 2 * width >= kWidth ? kRows - 1 : 0;
    TileTarget target{epilogue.bias[channel], epilogue.scale[channel], epilogue.shift[channel],
                      nullptr, halo_.stride, nullptr, width, whole_rows,
                      smaller(kWidth, width)};
    alignas(64) float tile[kRows * kWidth];
    for (int64_t next_row = 0; next_row < rows; next_row += kRows) {
      const int64_t row = smaller(next_row, rows - kRows);
      for (int64_t next_column = 0; next_column < width; next_column += kWidth) {
        const int64_t column = larger(0, smaller(next_column, width - kWidth));
        const float* centre =
            scratch + (row + halo_.radius) * halo_.stride + halo_.first_column + column;
        convolve(centre - halo_.radius * (halo_.stride + 1), halo_.stride, weight, size, tile);
        if (problem_.residual) target.residual = centre;
        target.out = out + row * width + column;
        finish(tile, target);
      }
    }
  }

  const DepthwiseProblem& problem_;
  Halo halo_;
  float* scratch_;
};

// Planes narrower than half a vector are computed with vectors of half the width, down to 4.
template <int kWidth>
void depthwise_bands(const DepthwiseProblem& problem, int64_t begin, int64_t end,
                     float* scratch) {
  if constexpr (kWidth > 4) {
    if (problem.width <= kWidth / 2) {
      depthwise_bands<kWidth / 2>(problem, begin, end, scratch);
      return;
    }
  }
  DepthwiseBands<kWidth>(problem, scratch).compute(begin, end);
}

}  // namespace
}  // namespace convmixer_fast::cpu
