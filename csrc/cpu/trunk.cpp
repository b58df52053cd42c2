#include "trunk.h"

#include <algorithm>

#include "dispatch.h"
#include "scratch.h"
#include "thread_pool.h"
#include "tiling.h"

namespace convmixer_fast::cpu {
namespace {

// One image on its way through the trunk.
class Pass {
 public:
  // buffers: two activations; the same one twice if there is one tile.
  Pass(const Trunk& trunk, const Patches& patches, const Tiling& tiling, float* first,
       float* second)
      : isa_(kernels()), trunk_(trunk), patches_(patches), tiling_(tiling),
        buffers_{first, second} {}

  // The stem is step 0, layers follow. Between the ops of a layer stands y.
  void tile(int64_t step, int64_t tile, const float* image, float* y) const {
    const int64_t begin = tiling_.begin(tile);
    const int64_t end = tiling_.begin(tile + 1);
    const int64_t stride = tiling_.largest() * kBlock;
    if (step == 0) {
      const int64_t blocks = blocks_of(patches_.depth());
      patches_to_blocks(image, patches_, begin, end, y, stride);
      // In place: a group of blocks becomes one, where others were that are done with.
      convert(trunk_.stem.numbers, y, stride, end - begin, blocks, y);
      product(trunk_.stem, patches_.depth(), step, tile, y);
      return;
    }
    const Layer& layer = trunk_.layers[static_cast<size_t>(step - 1)];
    const ProductBlock& pointwise = layer.pointwise;
    const int64_t blocks = blocks_of(layer.depthwise.channels);
    const int64_t group = pointwise.numbers.group();
    if (group == 1) {
      depthwise(layer.depthwise, step, 0, blocks, begin, end, y, stride);
    } else {
      float* floats = y + divide_up(blocks, group) * stride;
      for (int64_t first = 0; first < blocks; first += group) {
        const int64_t last = std::min(first + group, blocks);
        depthwise(layer.depthwise, step, first, last, begin, end, floats, stride);
        convert(pointwise.numbers, floats, stride, end - begin, last - first,
                y + first / group * stride);
      }
    }
    product(pointwise, layer.depthwise.channels, step, tile, y);
  }

  // Blocks [begin, end) of a step's output, or of its mean; `out` is where all of it goes.
  void store(size_t step, bool mean, int64_t begin, int64_t end, float* out) const {
    const int64_t first = begin * kBlock;
    const int64_t channels = std::min(end * kBlock, trunk_.channels_of(step)) - first;
    const int64_t pixels = tiling_.pixels;
    const float* last = buffers_[step % 2] + first * pixels;
    if (mean) {
      mean_of_blocks(last, channels, pixels, out + first);
    } else {
      from_blocks(last, pixels * kBlock, channels, pixels, 0, pixels, out + first * pixels);
    }
  }

  // The head on the mean: a product of one pixel. scratch: head_floats().
  void head(const float* mean, float* scratch, float* out) const {
    const ProductBlock& head = *trunk_.head;
    const int64_t channels = trunk_.channels_out();
    float* padded_mean = scratch;
    float* logits = scratch + blocks_of(channels) * kBlock;
    std::copy_n(mean, channels, padded_mean);
    std::fill(padded_mean + channels, logits, 0.0F);
    isa_.pointwise_tile({padded_mean, kBlock, 1, channels, head.weight, nullptr, head.epilogue,
                         blocks_of(head.channels_out), logits, kBlock});
    std::copy_n(logits, head.channels_out, out);
  }

  static int64_t head_floats(const Trunk& trunk) {
    if (!trunk.head) return 0;
    return (blocks_of(trunk.channels_out()) + blocks_of(trunk.head->channels_out)) * kBlock;
  }

 private:
  // Blocks [first, last) of the channels.
  void depthwise(const DepthwiseBlock& block, int64_t step, int64_t first, int64_t last,
                 int64_t begin, int64_t end, float* y, int64_t stride) const {
    const int64_t taps = block.kernel_size * block.kernel_size;
    isa_.depthwise_tile({buffers_[(step - 1) % 2] + first * tiling_.pixels * kBlock,
                         block.weight + first * taps * kBlock, block.epilogue.from_block(first),
                         block.residual, last - first, patches_.rows(), patches_.columns(),
                         block.kernel_size, begin, end, y, stride});
  }

  void convert(const Numbers& numbers, const float* y, int64_t stride, int64_t pixels,
               int64_t blocks, float* out) const {
    if (numbers.format == Format::kFloat32) return;
    const auto run = numbers.format == Format::kInt8 ? isa_.int8_tile : isa_.bfloat16_tile;
    run({y, stride, pixels, blocks, numbers.inverse_scale, numbers.zero, out, stride});
  }

  void product(const ProductBlock& block, int64_t depth, int64_t step, int64_t tile,
               const float* y) const {
    const int64_t begin = tiling_.begin(tile);
    const Numbers& numbers = block.numbers;
    const int64_t words =
        numbers.group() == 1 ? depth : divide_up(blocks_of(depth), numbers.group()) * kBlock;
    of(numbers.format)({y, tiling_.largest() * kBlock, tiling_.begin(tile + 1) - begin, words,
                        block.weight, numbers.sum_scale, block.epilogue,
                        blocks_of(block.channels_out), buffers_[step % 2] + begin * kBlock,
                        tiling_.pixels * kBlock});
  }

  void (*of(Format format) const)(const PointwiseTile&) {
    switch (format) {
      case Format::kInt8: return isa_.pointwise_int8_tile;
      case Format::kBfloat16: return isa_.pointwise_bfloat16_tile;
      case Format::kFloat32: break;
    }
    return isa_.pointwise_tile;
  }

  const Kernels& isa_;
  const Trunk& trunk_;
  const Patches& patches_;
  const Tiling& tiling_;
  float* buffers_[2];
};

// Where the parts of a call's scratch lie: activations of each image on its way, tiles of each
// thread.
class Buffers {
 public:
  Buffers(const Trunk& trunk, const Extent& extent, const Tiling& tiling, int64_t images,
          int threads)
      : mean_(padded(trunk.channels_out())),
        head_(padded(Pass::head_floats(trunk))),
        activation_(padded(extent.channels * extent.pixels)),
        tile_(padded(extent.tile_words * tiling.largest())),
        // One tile is read whole before any of it is written.
        per_image_(tiling.tiles == 1 ? 1 : 2),
        images_(images),
        scratch_(images * (per_image_ * activation_ + mean_ + head_) + threads * tile_),
        base_(scratch_.take(0)) {}

  float* first(int64_t image) const {
    return base_ + image * (per_image_ * activation_ + mean_ + head_);
  }
  float* second(int64_t image) const { return first(image) + (per_image_ - 1) * activation_; }
  float* mean(int64_t image) const { return first(image) + per_image_ * activation_; }
  float* head(int64_t image) const { return mean(image) + mean_; }
  float* tile(int participant) const { return first(images_) + participant * tile_; }

 private:
  int64_t mean_;
  int64_t head_;
  int64_t activation_;
  int64_t tile_;
  int64_t per_image_;
  int64_t images_;
  ScratchLease scratch_;
  float* base_;
};

// What a call of the whole trunk leaves, or one for intermediates.
struct Outputs {
  Result result;
  float* out;
  int64_t out_floats;           // of an image
  const std::vector<float*>* steps;  // of run_intermediates, then there is nothing else

  int64_t count(const Trunk& trunk) const {
    return static_cast<int64_t>(steps ? steps->size() : trunk.layers.size() + 1);
  }
  float* of(int64_t step) const { return steps ? (*steps)[static_cast<size_t>(step)] : nullptr; }
};

// Each image by one thread.
void run_images(const Trunk& trunk, const Extent& extent, const float* images, int64_t count,
                const Patches& patches, const Outputs& outputs, int threads) {
  const int64_t image_floats = patches.channels * patches.height * patches.width;
  const int64_t steps = outputs.count(trunk);
  const Result result = outputs.result;
  const Tiling tiling = extent.tiling(1);
  const Buffers buffers(trunk, extent, tiling, threads, threads);
  parallel_for({count}, threads, [&](int64_t, int64_t image, int participant) {
    const Pass pass(trunk, patches, tiling, buffers.first(participant),
                    buffers.second(participant));
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        pass.tile(step, tile, images + image * image_floats, buffers.tile(participant));
      }
      if (float* stored = outputs.of(step)) {
        const int64_t channels = trunk.channels_of(static_cast<size_t>(step));
        pass.store(static_cast<size_t>(step), false, 0, blocks_of(channels),
                   stored + image * channels * extent.pixels);
      }
    }
    if (outputs.steps) return;
    float* result_of_image = outputs.out + image * outputs.out_floats;
    float* stored = result == Result::kLogits ? buffers.mean(participant) : result_of_image;
    pass.store(trunk.layers.size(), result != Result::kFeatures, 0,
               blocks_of(trunk.channels_out()), stored);
    if (result == Result::kLogits) pass.head(stored, buffers.head(participant), result_of_image);
  });
}

// One image by all threads: a stage is complete before the next begins.
void run_image(const Trunk& trunk, const Extent& extent, const float* images, int64_t image,
               const Patches& patches, const Outputs& outputs, int threads) {
  const int64_t steps = outputs.count(trunk);
  const size_t last = static_cast<size_t>(steps - 1);
  const Result result = outputs.result;
  const Tiling tiling = extent.tiling(threads);
  const Buffers buffers(trunk, extent, tiling, 1, threads);
  const Pass pass(trunk, patches, tiling, buffers.first(0), buffers.second(0));
  const float* source = images + image * patches.channels * patches.height * patches.width;
  float* out = outputs.steps ? nullptr : outputs.out + image * outputs.out_floats;

  struct Stage {
    enum { kTiles, kStore, kHead } what;
    int64_t step;
    float* stored;
    int64_t blocks;
  };
  std::vector<Stage> stages;
  std::vector<int64_t> tasks;
  const auto add_store = [&](int64_t step, float* stored) {
    const int64_t blocks = blocks_of(trunk.channels_of(static_cast<size_t>(step)));
    stages.push_back({Stage::kStore, step, stored, blocks});
    tasks.push_back(std::min<int64_t>(blocks, threads));
  };
  for (int64_t step = 0; step < steps; ++step) {
    stages.push_back({Stage::kTiles, step, nullptr, 0});
    tasks.push_back(tiling.tiles);
    if (float* stored = outputs.of(step)) {
      const int64_t channels = trunk.channels_of(static_cast<size_t>(step));
      add_store(step, stored + image * channels * extent.pixels);
    }
  }
  float* stored = result == Result::kLogits ? buffers.mean(0) : out;
  if (!outputs.steps) add_store(static_cast<int64_t>(last), stored);
  if (result == Result::kLogits) {
    stages.push_back({Stage::kHead, 0, nullptr, 0});
    tasks.push_back(1);
  }
  parallel_for(tasks, threads, [&](int64_t index, int64_t task, int participant) {
    const Stage& stage = stages[static_cast<size_t>(index)];
    if (stage.what == Stage::kTiles) {
      pass.tile(stage.step, task, source, buffers.tile(participant));
    } else if (stage.what == Stage::kStore) {
      const int64_t parts = tasks[static_cast<size_t>(index)];
      pass.store(static_cast<size_t>(stage.step), result != Result::kFeatures,
                 task * stage.blocks / parts, (task + 1) * stage.blocks / parts, stage.stored);
    } else {
      pass.head(stored, buffers.head(0), out);
    }
  });
}

void run_all(const Trunk& trunk, const Extent& extent, const float* images, int64_t count,
             const Patches& patches, const Outputs& outputs, int threads) {
  const int64_t image_work = extent.pixels * extent.pixel_work;
  threads = useful_threads(threads, count * image_work);
  const int64_t steps = outputs.count(trunk);
  // Small images are not worth sharing out: one thread does a last one that is left over.
  const bool shared = threads > 1 && extent.pixels > 1 &&
                      image_work >= kTileWork * steps * threads;
  const int64_t alone = shared ? count - count % threads : count;
  if (alone > 0) {
    run_images(trunk, extent, images, alone, patches, outputs,
               static_cast<int>(std::min<int64_t>(threads, alone)));
  }
  for (int64_t image = alone; image < count; ++image) {
    run_image(trunk, extent, images, image, patches, outputs, threads);
  }
}

}  // namespace

void run_trunk(const Trunk& trunk, const float* images, int64_t count, const Patches& patches,
               Result result, float* out, int threads) {
  const Extent extent(trunk, patches);
  const int64_t out_floats =
      result == Result::kLogits
          ? trunk.head->channels_out
          : trunk.channels_out() * (result == Result::kMean ? 1 : extent.pixels);
  run_all(trunk, extent, images, count, patches, {result, out, out_floats, nullptr}, threads);
}

void run_intermediates(const Trunk& trunk, const float* images, int64_t count,
                       const Patches& patches, const std::vector<float*>& outs, int threads) {
  const Extent extent(trunk, patches);
  run_all(trunk, extent, images, count, patches, {Result::kFeatures, nullptr, 0, &outs}, threads);
}

}  // namespace convmixer_fast::cpu
