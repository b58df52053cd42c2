#include "openmp_team.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "placement.h"

namespace convmixer_fast::cpu {
namespace {

// The entry points of GNU's runtime, which LLVM's and Intel's have too.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;

  bool found() const { return parallel != nullptr && max_threads != nullptr; }
};

// Looked up among what PyTorch's library depends on: another copy of the runtime, as other
// packages bring along, would have threads of its own.
OpenMp find() {
  OpenMp found;
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(torch, "GOMP_parallel"));
  found.max_threads =
      reinterpret_cast<decltype(found.max_threads)>(dlsym(torch, "omp_get_max_threads"));
  return found;  // the library stays loaded, and so does its handle
}

std::atomic<bool> forked{false};
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// A thread of PyTorch's, and where it last ran. Known from its first work here to its end.
class Member;

struct Members {
  std::mutex mutex;
  std::vector<Member*> all;
};

// Never deleted: threads may end after static objects.
Members& members() {
  static auto* const everyone = new Members;
  return *everyone;
}

class Member {
 public:
  Member() {
    placement.begin();
    const std::lock_guard<std::mutex> lock(members().mutex);
    members().all.push_back(this);
  }
  ~Member() {
    const std::lock_guard<std::mutex> lock(members().mutex);
    auto& all = members().all;
    all.erase(std::find(all.begin(), all.end(), this));
  }
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  Placement placement;
};

using Clock = std::chrono::steady_clock;

// From then on threads that found nothing to do may be asleep, and wake where the caller is.
constexpr std::chrono::microseconds kAwake{200};
std::atomic<Clock::rep> last_end{0};

void keep_off_this_cpu() {
  const Clock::duration rested{Clock::now().time_since_epoch().count() - last_end.load()};
  const std::lock_guard<std::mutex> lock(members().mutex);
  const int cpu = current_cpu();
  for (Member* member : members().all) {
    if (rested > kAwake) member->placement.rest();
    member->placement.move_off(cpu);
  }
}

void let_run_anywhere() {
  last_end.store(Clock::now().time_since_epoch().count());
  const std::lock_guard<std::mutex> lock(members().mutex);
  for (Member* member : members().all) member->placement.settle();
}

struct Call {
  void (*body)(void* data, int participant);
  void* data;
  int threads;
  std::thread::id caller;
  std::atomic<int> begun{0};
};

void run_participant(void* argument) {
  Call& call = *static_cast<Call*>(argument);
  const bool is_caller = std::this_thread::get_id() == call.caller;
  const int participant = call.begun.fetch_add(1, std::memory_order_relaxed);
  if (participant < call.threads) call.body(call.data, participant);
  if (!is_caller) {
    thread_local Member member;
    const std::lock_guard<std::mutex> lock(members().mutex);
    member.placement.record();
  }
}

}  // namespace

bool run_on_openmp(int threads, void (*body)(void* data, int participant), void* data) {
  static const OpenMp openmp = find();
  if (!openmp.found() || forked.load()) return false;
  Call call{body, data, threads, std::this_thread::get_id()};
  // All that PyTorch uses, whatever is asked for: GNU's runtime ends threads that a smaller team
  // does not need, and starts them anew for the next one.
  const int team = std::max(threads, openmp.max_threads());
  keep_off_this_cpu();
  openmp.parallel(run_participant, &call, static_cast<unsigned>(team), 0);
  let_run_anywhere();
  return true;
}

}  // namespace convmixer_fast::cpu
