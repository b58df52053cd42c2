// How fast this machine multiplies and adds, with nothing to load: the ceiling of every product.
#pragma once

#include <ctime>

#include "arithmetic.h"
#include "kernels.h"

namespace convmixer_fast::cpu {
namespace {

inline double seconds_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Multiplications and additions a second, by the fastest of several rounds.
template <class Arithmetic, int kWidth>
double rate_of(Format format) {
  // As many as do not wait for each other; all stay in registers.
  constexpr int kSums = kWidth == 16 ? 24 : 12;
  constexpr int kSteps = 10000;
  constexpr Word kZeros[kWidth] = {};
  double least = 1;
  for (int round = 0; round < 6; ++round) {
    typename Arithmetic::Words y = Arithmetic::load(kZeros);
    typename Arithmetic::Sum sum[kSums] = {};
    const double begin = seconds_now();
    for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 32
      for (int s = 0; s < kSums; ++s) {
        keep(y);  // else one product would be added to all sums
        sum[s] = Arithmetic::add_product(sum[s], y, y);
      }
    }
    for (int s = 0; s < kSums; ++s) keep(sum[s]);
    const double taken = seconds_now() - begin;
    if (taken < least) least = taken;
  }
  return 2.0 * kSteps * kSums * kWidth * static_cast<int>(format) / least;
}

template <int kWidth>
double rate(Format format) {
  switch (format) {
    case Format::kFloat32: return rate_of<Float32<kWidth>, kWidth>(format);
    case Format::kInt8: return rate_of<Int8<kWidth>, kWidth>(format);
    case Format::kBfloat16: break;
  }
#if defined(__AVX512BF16__)
  return rate_of<Bfloat16, kWidth>(format);
#else
  return 0;
#endif
}

}  // namespace
}  // namespace convmixer_fast::cpu
