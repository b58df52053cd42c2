// The threads that PyTorch runs its own operations on.
#pragma once

namespace convmixer_fast::cpu {

// Calls body(data, participant) on `threads` of them at once, participant in [0, threads), the
// calling thread among them, and returns when all are done. There may be fewer, and participants
// missing, never the calling thread.
//
// Returns false, having done nothing, where PyTorch has no such threads in this process: it was
// built without OpenMP, or this is the child of fork(), where they do not exist.
bool run_on_openmp(int threads, void (*body)(void* data, int participant), void* data);

}  // namespace convmixer_fast::cpu
