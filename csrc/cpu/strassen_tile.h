// One level of Strassen's algorithm, in Winograd's form, on the product of a pointwise convolution.
//
// V. Strassen, "Gaussian elimination is not optimal", 1969; S. Winograd, "On multiplication of
// 2 x 2 matrices", 1971. With A the inputs (two block rows of pixels, two block columns of depth)
// and B the weights:
//   S1 = A21 + A22, S2 = S1 - A11, S3 = A11 - A21, S4 = A12 - S2
//   P1 = A11 B11, P2 = A12 B21, P3 = S4 B22, P4 = A22 T4, P5 = S1 T1, P6 = S2 T2, P7 = S3 T3
//   C11 = P1 + P2, C12 = P1 + P6 + P5 + P3, C21 = P1 + P6 + P7 - P4, C22 = P1 + P6 + P7 + P5
//
// These sums mix input channels and output channels: where one is much larger than the other, its
// rounding errors are large beside what the other contributes. So the weights are packed scaled by
// powers of two, such that all rows and columns are alike: inputs come scaled (residual_gain of the
// depthwise block before), and the epilogue's gain undoes the scaling of the outputs. Both are exact.
// They mix pixels too, and pixels are as they are: see csrc/README.md.
#pragma once

#include "pointwise_tile.h"

namespace convmixer_fast::cpu {
namespace {

constexpr int kProducts = 7;
constexpr int kInputSums = 4;

// Halves of the groups one after the other, each of at most `rows` pixels.
inline int64_t half_rows(const StrassenTile& tile, int64_t group) {
  return (tile.group_begin(group + 1) - tile.group_begin(group) + 1) / 2;
}

template <int kRows>
int64_t strassen_scratch(int64_t groups, int64_t depth) {
  return groups * kRows * (kInputSums * (depth / 2) + kProducts * kPanel);
}

template <int kRows, int kVectors, int kWidth>
class Strassen {
 public:
  explicit Strassen(const StrassenTile& tile)
      : tile_(tile),
        product_(tile.product),
        half_depth_(product_.depth / 2),
        groups_(tile.last_group - tile.first_group),
        sums_stride_(groups_ * kRows * kBlock),
        input_sums_(tile.scratch),
        products_(tile.scratch + kInputSums * half_depth_ * groups_ * kRows),
        finish_(select_finish<kWidth>(product_.epilogue.activation)) {}

  void run() const {
    for (int64_t group = 0; group < groups_; ++group) add_inputs(group);
    const int64_t panels = product_.blocks * kBlock / kPanel / 2;
    for (int64_t panel = 0; panel < panels; ++panel) {
      // A product's weights stay in the cache while all groups use them.
      for (int which = 0; which < kProducts; ++which) {
        const float* weight =
            product_.weight + (panel * kProducts + which) * half_depth_ * kPanel;
        for (int64_t group = 0; group < groups_; ++group) multiply(which, group, weight);
      }
      for (int64_t group = 0; group < groups_; ++group) add_products(group, panel);
    }
  }

 private:
  int64_t top(int64_t group) const { return tile_.group_begin(tile_.first_group + group); }
  int64_t rows(int64_t group) const { return half_rows(tile_, tile_.first_group + group); }
  int64_t bottom(int64_t group) const {
    return tile_.group_begin(tile_.first_group + group + 1) - rows(group);
  }

  float* input_sum(int which, int64_t group) const {
    return input_sums_ + which * half_depth_ / kBlock * sums_stride_ + group * kRows * kBlock;
  }

  float* product(int which, int64_t group) const {
    return products_ + (which * groups_ + group) * kRows * kPanel;
  }

  // S1 to S4 of a group.
  void add_inputs(int64_t group) const {
    const int64_t floats = rows(group) * kBlock;
    const int64_t blocks = half_depth_ / kBlock;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* left = product_.y + block * product_.y_block_stride;
      const float* right = left + blocks * product_.y_block_stride;
      const float* a11 = left + top(group) * kBlock;
      const float* a12 = right + top(group) * kBlock;
      const float* a21 = left + bottom(group) * kBlock;
      const float* a22 = right + bottom(group) * kBlock;
      float* s[kInputSums];
      for (int i = 0; i < kInputSums; ++i) s[i] = input_sum(i, group) + block * sums_stride_;
      for (int64_t at = 0; at < floats; at += kWidth) {
        const Vector<kWidth> first = load<kWidth>(a11 + at);
        const Vector<kWidth> third = load<kWidth>(a21 + at);
        const Vector<kWidth> s1 = third + load<kWidth>(a22 + at);
        const Vector<kWidth> s2 = s1 - first;
        store<kWidth>(s[0] + at, s1);
        store<kWidth>(s[1] + at, s2);
        store<kWidth>(s[2] + at, first - third);
        store<kWidth>(s[3] + at, load<kWidth>(a12 + at) - s2);
      }
    }
  }

  // P1 to P7 are 0 to 6.
  void multiply(int which, int64_t group, const float* weight) const {
    const float* left = product_.y;
    const float* right = left + half_depth_ / kBlock * product_.y_block_stride;
    const float* y = nullptr;
    int64_t stride = product_.y_block_stride;
    switch (which) {
      case 0: y = left + top(group) * kBlock; break;
      case 1: y = right + top(group) * kBlock; break;
      case 3: y = right + bottom(group) * kBlock; break;
      default:
        constexpr int kWhich[kProducts] = {0, 0, 3, 0, 0, 1, 2};
        y = input_sum(kWhich[which], group);
        stride = sums_stride_;
    }
    multiply_rows<kRows, kVectors, kWidth>(y, stride, half_depth_, weight, rows(group), kPanel,
                                           product(which, group));
  }

  // C11 to C22, and what follows the convolution.
  void add_products(int64_t group, int64_t panel) const {
    const int64_t count = rows(group);
    float* p[kProducts];
    for (int i = 0; i < kProducts; ++i) p[i] = product(i, group);
    for (int64_t at = 0; at < count * kPanel; at += kWidth) {
      const Vector<kWidth> p1 = load<kWidth>(p[0] + at);
      const Vector<kWidth> p5 = load<kWidth>(p[4] + at);
      const Vector<kWidth> u2 = p1 + load<kWidth>(p[5] + at);
      const Vector<kWidth> u3 = u2 + load<kWidth>(p[6] + at);
      const Vector<kWidth> c12 = u2 + p5 + load<kWidth>(p[2] + at);
      store<kWidth>(p[0] + at, p1 + load<kWidth>(p[1] + at));
      store<kWidth>(p[1] + at, c12);
      store<kWidth>(p[2] + at, u3 - load<kWidth>(p[3] + at));
      store<kWidth>(p[3] + at, u3 + p5);
    }
    const int64_t first = panel * (kPanel / kBlock);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t pixel = quarter < 2 ? top(group) : bottom(group);
      for (int64_t i = 0; i < kPanel / kBlock; ++i) {
        const int64_t block = first + i + quarter % 2 * (product_.blocks / 2);
        finish_(p[quarter] + i * count * kBlock, count, product_.epilogue.from(block * kBlock),
                nullptr, product_.z + block * product_.z_block_stride + pixel * kBlock);
      }
    }
  }

  const StrassenTile& tile_;
  const PointwiseTile& product_;
  int64_t half_depth_;
  int64_t groups_;
  int64_t sums_stride_;
  float* input_sums_;
  float* products_;
  Finish finish_;
};

template <int kRows, int kVectors, int kWidth>
void strassen_tile(const StrassenTile& tile) {
  Strassen<kRows, kVectors, kWidth>(tile).run();
}

}  // namespace
}  // namespace convmixer_fast::cpu
