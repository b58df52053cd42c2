#include "layout.h"

#include <algorithm>

namespace convmixer_fast::cpu {
namespace {

// Channels of the block, of which the last may have fewer.
int64_t channels_in(int64_t block, int64_t channels) {
  return std::min<int64_t>(kBlock, channels - block * kBlock);
}

}  // namespace

void to_blocks(const float* image, int64_t channels, int64_t pixels, int64_t begin, int64_t end,
               float* blocked, int64_t block_stride) {
  for (int64_t block = 0; block < blocks_of(channels); ++block) {
    const float* source = image + block * kBlock * pixels;
    float* target = blocked + block * block_stride - begin * kBlock;
    const int64_t count = channels_in(block, channels);
    // Few pixels at a time, so that what they are scattered over stays in the first cache.
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t last = std::min<int64_t>(first + kBlock, end);
      for (int64_t channel = 0; channel < kBlock; ++channel) {
        for (int64_t pixel = first; pixel < last; ++pixel) {
          target[pixel * kBlock + channel] =
              channel < count ? source[channel * pixels + pixel] : 0.0F;
        }
      }
    }
  }
}

void from_blocks(const float* blocked, int64_t block_stride, int64_t channels, int64_t pixels,
                 int64_t begin, int64_t end, float* image) {
  for (int64_t block = 0; block < blocks_of(channels); ++block) {
    const float* source = blocked + block * block_stride - begin * kBlock;
    float* target = image + block * kBlock * pixels;
    const int64_t count = channels_in(block, channels);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t last = std::min<int64_t>(first + kBlock, end);
      for (int64_t channel = 0; channel < count; ++channel) {
        for (int64_t pixel = first; pixel < last; ++pixel) {
          target[channel * pixels + pixel] = source[pixel * kBlock + channel];
        }
      }
    }
  }
}

void mean_of_blocks(const float* blocked, int64_t channels, int64_t pixels, float* mean) {
  // A long sum in float loses more digits than all layers together: only short pieces are.
  constexpr int64_t kPiece = 8;
  for (int64_t block = 0; block < blocks_of(channels); ++block) {
    const float* source = blocked + block * kBlock * pixels;
    double sum[kBlock] = {};
    for (int64_t first = 0; first < pixels; first += kPiece) {
      float piece[kBlock] = {};
      for (int64_t pixel = first; pixel < std::min(first + kPiece, pixels); ++pixel) {
        for (int i = 0; i < kBlock; ++i) piece[i] += source[pixel * kBlock + i];
      }
      for (int i = 0; i < kBlock; ++i) sum[i] += piece[i];
    }
    for (int64_t i = 0; i < channels_in(block, channels); ++i) {
      mean[block * kBlock + i] = static_cast<float>(sum[i] / static_cast<double>(pixels));
    }
  }
}

void patches_to_blocks(const float* image, const Patches& patches, int64_t begin, int64_t end,
                       float* blocked, int64_t block_stride) {
  for (int64_t patch = begin; patch < end; ++patch) {
    const float* corner = image + patch / patches.columns() * patches.patch_h * patches.width +
                          patch % patches.columns() * patches.patch_w;
    float* target = blocked + (patch - begin) * kBlock;
    int64_t lane = 0;
    for (int64_t channel = 0; channel < patches.channels; ++channel) {
      const float* row = corner + channel * patches.height * patches.width;
      for (int64_t y = 0; y < patches.patch_h; ++y, row += patches.width) {
        for (int64_t x = 0; x < patches.patch_w; ++x) {
          target[lane] = row[x];
          if (++lane == kBlock) {
            lane = 0;
            target += block_stride;
          }
        }
      }
    }
    if (lane > 0) std::fill(target + lane, target + kBlock, 0.0F);
  }
}

}  // namespace convmixer_fast::cpu
