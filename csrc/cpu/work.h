// What the drivers share: defaults of the epilogue and how many threads a piece of work is
// worth.
#pragma once

#include <algorithm>
#include <cstdint>

#include "blocks.h"
#include "scratch.h"

namespace convmixer_fast::cpu {

// Below this many multiplications a thread costs more to wake than it saves.
constexpr int64_t kThreadWork = 100'000;

inline int useful_threads(int threads, int64_t multiplications) {
  return static_cast<int>(std::clamp<int64_t>(multiplications / kThreadWork, 1, threads));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const float* or_constant(const float* vector, int64_t size, float value,
                                ScratchLease& scratch) {
  if (vector != nullptr) return vector;
  float* constant = scratch.take(size);
  std::fill_n(constant, size, value);
  return constant;
}

// Takes up to 3 * padded(channels) floats of scratch.
inline Epilogue make_epilogue(const ChannelVectors& vectors, int64_t channels,
                              Activation activation, ScratchLease& scratch) {
  return {or_constant(vectors.bias, channels, 0.0F, scratch),
          or_constant(vectors.scale, channels, 1.0F, scratch),
          or_constant(vectors.shift, channels, 0.0F, scratch), activation};
}

}  // namespace convmixer_fast::cpu
