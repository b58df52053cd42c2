// Memory that a call needs for packed operands, kept for the next call of the same thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

namespace convmixer_fast::cpu {

constexpr int64_t kCacheLineFloats = 16;

// Floats rounded up to whole cache lines.
inline int64_t padded(int64_t floats) {
  return (floats + kCacheLineFloats - 1) / kCacheLineFloats * kCacheLineFloats;
}

// One lease at a time and thread. Fresh memory costs a page fault every 4 KiB, so a block of
// moderate size outlives its lease.
class ScratchLease {
 public:
  // Throws std::bad_alloc.
  explicit ScratchLease(int64_t floats) {
    if (floats > size_) {
      block_.reset();
      size_ = 0;
      if (static_cast<uint64_t>(floats) > std::numeric_limits<size_t>::max() / sizeof(float)) {
        throw std::bad_alloc();
      }
      block_.reset(static_cast<float*>(
          ::operator new(static_cast<size_t>(floats) * sizeof(float), kAlignment)));
      size_ = floats;
    }
    next_ = block_.get();
  }

  ~ScratchLease() {
    if (size_ > kKeptFloats) {
      block_.reset();
      size_ = 0;
    }
  }

  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  // Hands out the next part of the lease, aligned to a cache line.
  float* take(int64_t floats) {
    float* part = next_;
    next_ += padded(floats);
    return part;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static constexpr int64_t kKeptFloats = int64_t{8} << 20;  // 32 MiB

  struct Deleter {
    void operator()(float* block) const { ::operator delete(block, kAlignment); }
  };

  inline static thread_local std::unique_ptr<float, Deleter> block_;
  inline static thread_local int64_t size_ = 0;
  float* next_;
};

}  // namespace convmixer_fast::cpu
