// The ops one by one, and the packing of weights.
#include <algorithm>

#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"
#include "tiling.h"
#include "trunk.h"

namespace convmixer_fast::cpu {

void pack(const float* matrix, int64_t rows, int64_t depth, int64_t lanes, float* packed,
          int threads) {
  // A cache line of each row at a time: where the depth is a power of two, as many rows as there
  // are lanes compete for one cache set.
  constexpr int64_t kLine = kCacheLineFloats;
  threads = useful_threads(threads, rows * depth);
  parallel_for({divide_up(rows, lanes)}, threads, [&](int64_t, int64_t task, int) {
    const float* source = matrix + task * lanes * depth;
    float* target = packed + task * lanes * depth;
    const int64_t count = std::min(lanes, rows - task * lanes);
    for (int64_t begin = 0; begin < depth; begin += kLine) {
      const int64_t end = std::min(begin + kLine, depth);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        for (int64_t k = begin; k < end; ++k) {
          target[k * lanes + lane] = lane < count ? source[lane * depth + k] : 0.0F;
        }
      }
    }
  });
}

void run_depthwise(const DepthwiseBlock& block, const float* x, int64_t images, int64_t height,
                   int64_t width, float* out, int threads) {
  const Kernels& isa = kernels();
  const int64_t pixels = height * width;
  const int64_t blocks = blocks_of(block.channels);
  const int64_t taps = block.kernel_size * block.kernel_size;
  const int64_t radius = block.kernel_size / 2;
  threads = useful_threads(threads, images * block.channels * pixels * taps);
  // Large images in bands of rows, which are read with those above and below that they touch.
  const int64_t most_rows = std::max(kTileFloats / (width * kBlock), radius + 1);
  const int64_t bands = divide_up(height, most_rows);
  const int64_t band_rows = divide_up(height, bands);
  const int64_t read_floats = std::min(band_rows + 2 * radius, height) * width * kBlock;
  const int64_t part = padded(read_floats + band_rows * width * kBlock);
  ScratchLease scratch(threads * part);
  float* parts = scratch.take(threads * part);
  parallel_for({images * blocks * bands}, threads, [&](int64_t, int64_t task, int participant) {
    const int64_t first = task / bands % blocks;
    const int64_t at =
        (task / bands / blocks * block.channels + first * kBlock) * pixels;
    const int64_t channels = std::min<int64_t>(kBlock, block.channels - first * kBlock);
    const int64_t row = task % bands * height / bands;
    const int64_t end = (task % bands + 1) * height / bands;
    const int64_t read = std::max<int64_t>(row - radius, 0);
    const int64_t read_end = std::min(end + radius, height);
    float* input = parts + participant * part;
    float* result = input + read_floats;
    to_blocks(x + at, channels, pixels, read * width, read_end * width, input, read_floats);
    isa.depthwise_tile({input, block.weight + first * taps * kBlock,
                        block.epilogue.from_block(first), block.residual, 1, read_end - read, width,
                        block.kernel_size, (row - read) * width, (end - read) * width, result,
                        part});
    from_blocks(result, part, channels, pixels, row * width, end * width, out + at);
  });
}

void run_product(const ProductBlock& block, const float* x, int64_t images,
                 const Patches& patches, float* out, int threads) {
  // A trunk without layers, of which each image's tiles are tasks of their own.
  const Kernels& isa = kernels();
  Trunk trunk{block, {}, {}};
  const Extent extent(trunk, patches);
  threads = useful_threads(threads, images * extent.pixels * extent.pixel_work);
  const Tiling tiling = extent.tiling(images >= 4 * threads ? 1 : threads);
  const int64_t depth_floats = blocks_of(patches.depth()) * kBlock;
  const int64_t blocks = blocks_of(block.channels_out);
  const int64_t stride = tiling.largest() * kBlock;
  const int64_t part = padded((depth_floats + blocks * kBlock) * tiling.largest());
  ScratchLease scratch(threads * part);
  float* parts = scratch.take(threads * part);
  const int64_t image_floats = patches.channels * patches.height * patches.width;
  parallel_for({images * tiling.tiles}, threads, [&](int64_t, int64_t task, int participant) {
    const int64_t image = task / tiling.tiles;
    const int64_t begin = tiling.begin(task % tiling.tiles);
    const int64_t pixels = tiling.begin(task % tiling.tiles + 1) - begin;
    float* y = parts + participant * part;
    float* z = y + depth_floats * tiling.largest();
    const float* source = x + image * image_floats;
    if (patches.patch_h * patches.patch_w == 1) {
      to_blocks(source, patches.channels, extent.pixels, begin, begin + pixels, y, stride);
    } else {
      patches_to_blocks(source, patches, begin, begin + pixels, y, stride);
    }
    isa.pointwise_tile({y, stride, pixels, patches.depth(), block.weight, nullptr, block.epilogue,
                        blocks, z, stride});
    from_blocks(z, stride, block.channels_out, extent.pixels, begin, begin + pixels,
                out + image * block.channels_out * extent.pixels);
  });
}

}  // namespace convmixer_fast::cpu
