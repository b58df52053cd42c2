#include <algorithm>

#include "blocks.h"
#include "dispatch.h"
#include "kernels.h"
#include "scratch.h"
#include "thread_pool.h"
#include "work.h"

namespace convmixer_fast::cpu {
namespace {

// A band with its halo should stay in the L2 cache beside what flows through it.
constexpr int64_t kBandFloats = 64 * 1024;

// Multiplications in one task: small enough to spread evenly, large enough to be worth taking.
constexpr int64_t kTaskWork = 200'000;

}  // namespace

void depthwise_block(const float* x, const float* weight, float* out, const ImageShape& shape,
                     int64_t kernel_size, const ChannelVectors& vectors, Activation activation,
                     bool residual, int threads) {
  const Kernels& isa = kernels();
  const int64_t max_rows = std::max<int64_t>(kBandFloats / (shape.width + kernel_size), 8);
  const int64_t band_height = divide_up(shape.height, divide_up(shape.height, max_rows));

  DepthwiseProblem problem{};
  problem.x = x;
  problem.weight = weight;
  problem.out = out;
  problem.residual = residual;
  problem.channels = shape.channels;
  problem.height = shape.height;
  problem.width = shape.width;
  problem.kernel_size = kernel_size;
  problem.band_height = band_height;
  problem.bands = divide_up(shape.height, band_height);

  const int64_t bands = shape.images * shape.channels * problem.bands;
  const int64_t band_work = band_height * shape.width * kernel_size * kernel_size;
  const int64_t task_bands = std::max<int64_t>(kTaskWork / band_work, 1);
  threads = useful_threads(threads, bands * band_work);

  const int64_t thread_scratch = padded(isa.depthwise_scratch(problem));
  ScratchLease scratch(3 * padded(shape.channels) + threads * thread_scratch);
  problem.epilogue = make_epilogue(vectors, shape.channels, activation, scratch);
  float* halos = scratch.take(threads * thread_scratch);

  parallel_for(divide_up(bands, task_bands), threads, [&](int64_t task, int participant) {
    const int64_t begin = task * task_bands;
    isa.depthwise_bands(problem, begin, std::min(begin + task_bands, bands),
                        halos + participant * thread_scratch);
  });
}

}  // namespace convmixer_fast::cpu
