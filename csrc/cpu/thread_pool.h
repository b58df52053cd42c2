// A small pool of persistent threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace convmixer_fast::cpu {

// Runs body(step, task, participant) for each task in [0, tasks[step]) of each step, on at most
// `threads` threads, the calling one among them, and returns when all are done. A step's tasks
// begin when those of the steps before are done, all of whose writes they then see. participant,
// in [0, threads), is different for bodies that run at the same time. Which participant gets a
// task is left to chance: a result must not depend on it.
//
// Safe to call from several threads at once: while one call has the pool, others run their
// tasks on their own thread alone. Safe in the child after fork(). If a body throws, tasks not
// yet begun are dropped and the first exception is thrown again here.
void parallel_for(const std::vector<int64_t>& tasks, int threads,
                  const std::function<void(int64_t step, int64_t task, int participant)>& body);

}  // namespace convmixer_fast::cpu
