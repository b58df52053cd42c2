// Between PyTorch's layout (channels, pixels) and blocks of channels (blocks, pixels, kBlock).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace convmixer_fast::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t blocks_of(int64_t channels) { return divide_up(channels, kBlock); }

// Pixels [begin, end) of an image (channels, pixels), the channels beyond the last becoming zero.
// blocked is that of pixel `begin`; blocks are block_stride floats apart.
void to_blocks(const float* image, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
               float* blocked, int64_t block_stride);

// The same back.
void from_blocks(const float* blocked, int64_t block_stride, int64_t channels, int64_t pixels,
                 int64_t begin, int64_t end, float* image);

// The mean of each channel over the pixels.
void mean_of_blocks(const float* blocked, int64_t channels, int64_t pixels, float* mean);

// How an image is cut into patches, each of which becomes a pixel.
struct Patches {
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t patch_h;
  int64_t patch_w;

  int64_t rows() const { return height / patch_h; }
  int64_t columns() const { return width / patch_w; }
  int64_t depth() const { return channels * patch_h * patch_w; }
};

// The patches [begin, end), in raster order, with their pixels as channels; those beyond the last are
// zero.
void patches_to_blocks(const float* image, const Patches& patches, int64_t begin, int64_t end,
                       float* blocked, int64_t block_stride);

}  // namespace convmixer_fast::cpu
