// How much work there is, and in which pieces it is cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout.h"
#include "trunk.h"

namespace convmixer_fast::cpu {

// Floats that a tile holds between the two ops of a layer: it should stay in a 1 MiB L2 cache
// beside a panel of weights.
constexpr int64_t kTileFloats = 112 * 1024;
constexpr int64_t kMostTilePixels = 448;
constexpr int64_t kFewestTilePixels = 28;

// Multiplications below which a thread costs more to wake, and a tile to wait for, than it saves.
constexpr int64_t kThreadWork = 200'000;
constexpr int64_t kTileWork = 50'000;

inline int useful_threads(int threads, int64_t multiplications) {
  return static_cast<int>(std::clamp<int64_t>(multiplications / kThreadWork, 1, threads));
}

// The pixels of an image in tiles, all of equal size, give or take one pixel.
struct Tiling {
  int64_t pixels;
  int64_t tiles;

  int64_t begin(int64_t tile) const { return tile * pixels / tiles; }
  int64_t largest() const { return divide_up(pixels, tiles); }
};

// How large the buffers are, and how much work a pixel is.
struct Extent {
  explicit Extent(const Trunk& trunk, const Patches& patches)
      : pixels(patches.rows() * patches.columns()),
        tile_words(blocks_of(patches.depth()) * kBlock),
        channels(blocks_of(trunk.stem.channels_out) * kBlock),
        pixel_work(patches.depth() * trunk.stem.channels_out) {
    for (const Layer& layer : trunk.layers) {
      const int64_t in = layer.depthwise.channels;
      const int64_t out = layer.pointwise.channels_out;
      const int64_t work = in * (layer.depthwise.kernel_size * layer.depthwise.kernel_size + out);
      // A group of blocks as floats stands beside all of them as smaller numbers.
      const int64_t group = layer.pointwise.numbers.group();
      const int64_t blocks =
          group == 1 ? blocks_of(in) : divide_up(blocks_of(in), group) + group;
      tile_words = std::max(tile_words, blocks * kBlock);
      channels = std::max(channels, blocks_of(out) * kBlock);
      pixel_work += work;
    }
  }

  // For one thread: as large as the cache allows. For several: a whole number for each.
  Tiling tiling(int threads) const {
    const int64_t most = std::clamp(kTileFloats / tile_words, kFewestTilePixels,
                                    kMostTilePixels);
    int64_t tiles = divide_up(pixels, most);
    if (threads > 1) {
      tiles = std::max<int64_t>(tiles, 2 * threads);
      tiles = std::min(tiles, std::max<int64_t>(pixels / kFewestTilePixels, threads));
      tiles = divide_up(tiles, threads) * threads;
    }
    return {pixels, std::clamp<int64_t>(tiles, 1, pixels)};
  }

  int64_t pixels;
  int64_t tile_words;  // of a pixel, of the widest input of a product
  int64_t channels;    // of the widest activation
  int64_t pixel_work;
};

}  // namespace convmixer_fast::cpu
