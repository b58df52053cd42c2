// The table of one ISA's kernels. Included by the isa_*.cpp files, each compiled with its own
// flags.
#pragma once

#include "depthwise_block.h"
#include "gemm.h"
#include "kernels.h"
#include "patch_embed.h"
#include "pointwise_block.h"

namespace convmixer_fast::cpu {
namespace {

// kWidth: floats in a register. A product's tile of kTileRows x kVectors registers, with one
// register per vector for the panel and one for the weight, should just fit the register file.
template <int kWidth, int kTileRows, int kVectors>
constexpr Kernels make_kernels(const char* isa) {
  constexpr int kColumns = kVectors * kWidth;
  return {isa,
          depthwise_scratch,
          depthwise_bands<kWidth>,
          kTileRows,
          kColumns,
          pack_weight_tile,
          pack_pixels<kColumns, kWidth>,
          pack_patches<kColumns, kWidth>,
          multiply_tile<kTileRows, kVectors, kWidth>};
}

}  // namespace
}  // namespace convmixer_fast::cpu
