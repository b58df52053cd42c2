// pointwise_block and patch_embed: one product, two ways of packing its columns.
#include <algorithm>

#include "blocks.h"
#include "dispatch.h"
#include "kernels.h"
#include "scratch.h"
#include "thread_pool.h"
#include "work.h"

namespace convmixer_fast::cpu {
namespace {

// Packed panels of one task, which reads all weights once: they should leave room for weights
// in a 1 MiB L2 cache, and be small enough for the tasks to spread evenly over the threads.
constexpr int64_t kBlockFloats = 96 * 1024;
constexpr int64_t kMaxBlockPanels = 8;
constexpr int64_t kBlocksPerThread = 4;

// The rows of a product in tiles of equal height, give or take one: no small tile is left over.
class RowTiles {
 public:
  RowTiles(int64_t rows, int64_t max_rows) : rows_(rows), count_(divide_up(rows, max_rows)) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t tile) const { return tile * rows_ / count_; }
  int64_t end(int64_t tile) const { return begin(tile + 1); }

 private:
  int64_t rows_;
  int64_t count_;
};

// How a product is cut into tasks: blocks of panels, and where these are too few for the
// threads, groups of row tiles too.
struct Blocking {
  Blocking(int64_t panels, int64_t row_tiles, int64_t panel_floats, int threads) {
    const int64_t cached = kBlockFloats / std::max<int64_t>(panel_floats, 1);
    const int64_t spread = divide_up(panels, kBlocksPerThread * threads);
    block_panels = std::max<int64_t>(std::min({cached, spread, kMaxBlockPanels}), 1);
    blocks = divide_up(panels, block_panels);
    const int64_t wanted = divide_up(threads, blocks);
    group_tiles = divide_up(row_tiles, std::min(wanted, row_tiles));
    groups = divide_up(row_tiles, group_tiles);
  }

  int64_t block_panels;
  int64_t blocks;
  int64_t group_tiles;
  int64_t groups;
};

using PackPanels = void (*)(const PatchProblem& problem, int64_t first_panel, int64_t panels,
                            float* packed);

void pack_weights(const Kernels& isa, const float* weight, const PatchProblem& problem,
                  const RowTiles& tiles, int threads, float* packed) {
  parallel_for(tiles.count(), threads, [&](int64_t tile, int) {
    isa.pack_weight_tile(weight, problem.depth, tiles.begin(tile), tiles.end(tile),
                         packed + tiles.begin(tile) * problem.depth);
  });
}

void multiply(const Kernels& isa, const PatchProblem& problem, const RowTiles& tiles,
              const Blocking& blocking, PackPanels pack_panels, const float* packed_weights,
              float* packed_panels, int threads) {
  const int64_t panel_floats = problem.depth * isa.panel_columns;
  const int64_t panels = divide_up(problem.columns, isa.panel_columns);
  const auto multiply_block = [&](int64_t task, int participant) {
    const int64_t first_panel = task / blocking.groups * blocking.block_panels;
    const int64_t block_panels = std::min(blocking.block_panels, panels - first_panel);
    float* packed = packed_panels + participant * padded(panel_floats) * blocking.block_panels;
    pack_panels(problem, first_panel, block_panels, packed);

    const int64_t first_tile = task % blocking.groups * blocking.group_tiles;
    const int64_t last_tile = std::min(first_tile + blocking.group_tiles, tiles.count());
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      for (int64_t panel = 0; panel < block_panels; ++panel) {
        isa.multiply_tile(problem, packed_weights + tiles.begin(tile) * problem.depth,
                          tiles.begin(tile), tiles.end(tile), packed + panel * panel_floats,
                          first_panel + panel);
      }
    }
  };
  parallel_for(blocking.blocks * blocking.groups, threads, multiply_block);
}

void run(const Kernels& isa, PatchProblem& problem, const float* weight,
         const ChannelVectors& vectors, Activation activation, PackPanels pack_panels,
         int threads) {
  threads = useful_threads(threads, problem.rows * problem.depth * problem.columns);
  const int64_t panel_floats = padded(problem.depth * isa.panel_columns);
  const int64_t panels = divide_up(problem.columns, isa.panel_columns);
  const RowTiles tiles(problem.rows, isa.tile_rows);
  const Blocking blocking(panels, tiles.count(), panel_floats, threads);

  const int64_t weight_floats = padded(problem.rows * problem.depth);
  const int64_t block_floats = threads * blocking.block_panels * panel_floats;
  ScratchLease scratch(3 * padded(problem.rows) + weight_floats + block_floats);
  problem.epilogue = make_epilogue(vectors, problem.rows, activation, scratch);
  float* packed_weights = scratch.take(weight_floats);
  float* packed_panels = scratch.take(block_floats);

  pack_weights(isa, weight, problem, tiles, threads, packed_weights);
  multiply(isa, problem, tiles, blocking, pack_panels, packed_weights, packed_panels, threads);
}

PatchProblem make_problem(const float* x, float* out, const ImageShape& shape,
                          int64_t channels_out, int64_t patch_h, int64_t patch_w) {
  PatchProblem problem{};
  problem.x = x;
  problem.out = out;
  problem.channels = shape.channels;
  problem.height = shape.height;
  problem.width = shape.width;
  problem.patch_h = patch_h;
  problem.patch_w = patch_w;
  problem.grid_h = shape.height / patch_h;
  problem.grid_w = shape.width / patch_w;
  problem.rows = channels_out;
  problem.depth = shape.channels * patch_h * patch_w;
  problem.columns = shape.images * problem.grid_h * problem.grid_w;
  return problem;
}

}  // namespace

void pointwise_block(const float* x, const float* weight, float* out, const ImageShape& shape,
                     int64_t channels_out, const ChannelVectors& vectors, Activation activation,
                     int threads) {
  const Kernels& isa = kernels();
  PatchProblem problem = make_problem(x, out, shape, channels_out, 1, 1);
  run(isa, problem, weight, vectors, activation, isa.pack_pixels, threads);
}

void patch_embed(const float* x, const float* weight, float* out, const ImageShape& shape,
                 int64_t channels_out, int64_t patch_h, int64_t patch_w,
                 const ChannelVectors& vectors, Activation activation, int threads) {
  const Kernels& isa = kernels();
  PatchProblem problem = make_problem(x, out, shape, channels_out, patch_h, patch_w);
  run(isa, problem, weight, vectors, activation, isa.pack_patches, threads);
}

}  // namespace convmixer_fast::cpu
