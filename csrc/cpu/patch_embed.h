// Packing the patches of an image into panels, straight from the image.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

template <int kColumns, int kWidth>
void pack_patches(const PatchProblem& problem, int64_t first_panel, int64_t panels,
                  float* packed) {
  const int64_t grid = problem.grid_h * problem.grid_w;
  const int64_t image_floats = problem.channels * problem.height * problem.width;
  for (int64_t panel = first_panel; panel < first_panel + panels; ++panel) {
    const int64_t first = panel * kColumns;
    const int64_t columns = smaller(kColumns, problem.columns - first);
    // Where each column's patch begins; columns beyond the last read the last, then get zeros.
    int64_t corner[kColumns];
    for (int64_t column = 0; column < kColumns; ++column) {
      const int64_t patch = first + smaller(column, columns - 1);
      const int64_t row = patch % grid / problem.grid_w;
      corner[column] = patch / grid * image_floats + row * problem.patch_h * problem.width +
                       patch % problem.grid_w * problem.patch_w;
    }
    for (int64_t channel = 0; channel < problem.channels; ++channel) {
      for (int64_t row = 0; row < problem.patch_h; ++row) {
        const float* x = problem.x + (channel * problem.height + row) * problem.width;
        for (int64_t i = 0; i < problem.patch_w; ++i) {
          for (int column = 0; column < kColumns; ++column) packed[column] = x[corner[column] + i];
          if (columns < kColumns) fill<kWidth>(packed + columns, 0.0F, kColumns - columns);
          packed += kColumns;
        }
      }
    }
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
