// Packing the pixels of a pointwise convolution into panels.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace convmixer_fast::cpu {
namespace {

template <int kColumns, int kWidth>
void pack_pixels(const PatchProblem& problem, int64_t first_panel, int64_t panels,
                 float* packed) {
  const int64_t grid = problem.grid_h * problem.grid_w;
  const int64_t first = first_panel * kColumns;
  const int64_t columns = smaller(panels * kColumns, problem.columns - first);
  const int64_t first_image = first / grid;
  const int64_t panel_floats = problem.depth * kColumns;
  // Channels outside: the panels of one channel are read as one contiguous piece.
  for (int64_t channel = 0; channel < problem.channels; ++channel) {
    const float* x = problem.x + (first_image * problem.channels + channel) * grid;
    float* target = packed + channel * kColumns;
    int64_t pixel = first % grid;
    int64_t column = 0;
    while (column < columns) {
      const int64_t in_panel = column % kColumns;
      const int64_t run = smaller(smaller(columns - column, grid - pixel), kColumns - in_panel);
      if (run == kColumns) {
        copy_floats<kWidth>(target, x + pixel, kColumns);
      } else {
        copy_floats<kWidth>(target + in_panel, x + pixel, run);
      }
      column += run;
      pixel += run;
      if (in_panel + run == kColumns) target += panel_floats;
      if (pixel == grid) {
        pixel = 0;
        x += problem.channels * grid;
      }
    }
    const int64_t in_panel = column % kColumns;
    if (in_panel != 0) fill<kWidth>(target + in_panel, 0.0F, kColumns - in_panel);
  }
}

}  // namespace
}  // namespace convmixer_fast::cpu
