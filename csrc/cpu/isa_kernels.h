// The table of one ISA's kernels. Included by the isa_*.cpp files, each compiled with its own
// flags.
#pragma once

#include "convert_tile.h"
#include "depthwise_tile.h"
#include "kernels.h"
#include "pointwise_tile.h"
#include "rate.h"

namespace convmixer_fast::cpu {
namespace {

// kWidth: floats in a register. A product's register tile of kRows x kVectors, with kVectors for
// the weights and one for the input, should just fit the register file; so should a depthwise
// strip of kColumns, with a kernel row's weights and one for the input. 8-bit products without
// VNNI need two registers more: kInt8Rows.
template <int kWidth, int kRows, int kVectors, int kColumns, int kInt8Rows>
constexpr Kernels make_kernels(const char* isa) {
  static_assert(kPanel % (kVectors * kWidth) == 0 && kBlock % kWidth == 0);
  static_assert(kVectors * kWidth <= kBlock || kVectors * kWidth == kPanel);
  return {isa, depthwise_tile<kColumns, kWidth>,
          pointwise_tile<Float32<kWidth>, kRows, kVectors, kWidth>,
          convert_tile<ToInt8<kWidth>, kWidth>,
          pointwise_tile<Int8<kWidth>, kInt8Rows, kVectors, kWidth>, nullptr, nullptr, rate<kWidth>};
}

}  // namespace
}  // namespace convmixer_fast::cpu
