// Keeping a worker off the CPU of the thread that wakes it.
//
// Linux tends to wake a thread on the CPU where it ran last or on the waker's own, even where
// another is idle; a waker that goes on computing then shares its CPU with the worker for
// many milliseconds, and two threads are no faster than one. Elsewhere nothing is done.
#pragma once

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace convmixer_fast::cpu {

#if defined(__linux__)

inline int current_cpu() { return sched_getcpu(); }

// The placement of one worker. Its calls are serialised by the caller.
class Placement {
 public:
  // By the worker, when it starts.
  void begin() {
    worker_ = pthread_self();
    started_ = true;
    record();
  }

  // By the worker, before it rests.
  void record() { cpu_ = current_cpu(); }

  // By the worker, before it goes to sleep.
  void rest() { resting_ = true; }

  // By the waker: moves the worker where it is on `cpu`, or might wake there, and may run elsewhere.
  void move_off(int cpu) {
    cpu_set_t elsewhere;
    if (!started_ || moved_ || cpu < 0 || cpu >= CPU_SETSIZE) return;
    if (!resting_ && cpu != cpu_) return;
    if (pthread_getaffinity_np(worker_, sizeof allowed_, &allowed_) != 0) return;
    elsewhere = allowed_;
    CPU_CLR(cpu, &elsewhere);
    if (CPU_COUNT(&elsewhere) == 0) return;
    moved_ = pthread_setaffinity_np(worker_, sizeof elsewhere, &elsewhere) == 0;
  }

  // By the worker, once awake: it may run anywhere again.
  void settle() {
    resting_ = false;
    if (moved_) pthread_setaffinity_np(worker_, sizeof allowed_, &allowed_);
    moved_ = false;
  }

 private:
  bool started_ = false;
  bool moved_ = false;
  bool resting_ = false;
  int cpu_ = -1;
  pthread_t worker_{};
  cpu_set_t allowed_{};
};

#else

inline int current_cpu() { return -1; }

class Placement {
 public:
  void begin() {}
  void record() {}
  void rest() {}
  void move_off(int) {}
  void settle() {}
};

#endif

}  // namespace convmixer_fast::cpu
