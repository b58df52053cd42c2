#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "openmp_team.h"
#include "placement.h"

namespace convmixer_fast::cpu {
namespace {

using Body = std::function<void(int64_t step, int64_t task, int participant)>;

// How long a thread looks for work, or for the end of it, before it sleeps. Waking a sleeper
// costs as much as a small layer, and the next layer usually comes within this time.
constexpr std::chrono::microseconds kSpinTime{200};

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
void spin_until(const Condition& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  while (!condition() && std::chrono::steady_clock::now() < deadline) {
    for (int i = 0; i < 16 && !condition(); ++i) pause();
  }
}

// One call of parallel_for: tasks are taken, in their order, from a common counter. Whoever has
// taken one of a later step waits for those of earlier steps, which others are at work on: nobody
// is waited for that has not begun.
class Job {
 public:
  Job(const std::vector<int64_t>& tasks, const Body& body) : body_(body) {
    ends_.reserve(tasks.size());
    int64_t end = 0;
    for (const int64_t count : tasks) ends_.push_back(end += count);
  }

  int64_t tasks() const { return ends_.empty() ? 0 : ends_.back(); }

  void work(int participant) noexcept {
    size_t step = 0;
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks()) return;
      while (task >= ends_[step]) ++step;
      const int64_t begin = step == 0 ? 0 : ends_[step - 1];
      wait_for(begin);
      try {
        if (!failed_.load(std::memory_order_relaxed)) {
          body_(static_cast<int64_t>(step), task - begin, participant);
        }
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        failed_.store(true, std::memory_order_relaxed);
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void wait_for(int64_t tasks) const {
    const auto reached = [&] { return done_.load(std::memory_order_acquire) >= tasks; };
    spin_until(reached);
    // The thread that is waited for may have lost its CPU.
    while (!reached()) std::this_thread::yield();
  }

  const Body& body_;
  std::vector<int64_t> ends_;  // of the steps, counted over all tasks
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

class ThreadPool {
 public:
  // Returns false, having done nothing, while another call has the pool.
  bool try_run(Job& job, int threads) {
    const std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (!caller) return false;
    const int helpers = grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const int cpu = current_cpu();
      for (Placement& worker : workers_) worker.move_off(cpu);
      job_ = &job;
      vacancies_ = helpers;
      posted_.fetch_add(1, std::memory_order_relaxed);
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.work(0);
    withdraw();
    return true;
  }

 private:
  // Threads are started when first asked for. Where the system refuses one, those there are
  // do the work.
  int grow(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
      const std::lock_guard<std::mutex> lock(mutex_);
      Placement& placement = workers_.emplace_back();
      try {
        // Detached, as the pool lives until the process ends: nobody waits for it at exit.
        std::thread([this, &placement] { serve(placement); }).detach();
      } catch (const std::exception&) {
        workers_.pop_back();
        break;
      }
    }
    return std::min(wanted, static_cast<int>(workers_.size()));
  }

  // Takes the job back, and waits for the workers that have begun.
  void withdraw() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    spin_until([this] { return busy_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load(std::memory_order_relaxed) == 0; });
  }

  [[noreturn]] void serve(Placement& placement) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    placement.begin();
    for (;;) {
      lock.unlock();
      spin_until([&] { return posted_.load(std::memory_order_relaxed) != seen; });
      lock.lock();
      placement.rest();
      wake_.wait(lock, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
      placement.settle();
      seen = posted_.load(std::memory_order_relaxed);
      if (job_ == nullptr || vacancies_ == 0) continue;
      Job& job = *job_;
      const int participant = vacancies_--;
      busy_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work(participant);
      lock.lock();
      placement.record();
      if (busy_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the call that has the pool; only that call adds workers

  std::mutex mutex_;  // guards what follows; the atomics are also read while spinning
  std::deque<Placement> workers_;  // a deque, as each worker keeps its address
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int vacancies_ = 0;
  std::atomic<int> busy_{0};
  std::atomic<uint64_t> posted_{0};
};

// Never deleted: workers may be asleep in it when the process ends.
std::atomic<ThreadPool*> current_pool{nullptr};

// The workers do not exist in the child of fork(), and a lock may be held there by a thread
// that does not exist either: the child leaves the pool as it is and starts anew.
const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });

ThreadPool& pool() {
  ThreadPool* existing = current_pool.load();
  if (existing != nullptr) return *existing;
  auto* fresh = new ThreadPool;
  if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;  // another thread was faster
  return *existing;
}

}  // namespace

void parallel_for(const std::vector<int64_t>& tasks, int threads, const Body& body) {
  static std::atomic<bool> shared{false};
  Job job(tasks, body);
  const int useful = static_cast<int>(std::min<int64_t>(threads, job.tasks()));
  const auto work = [](void* data, int participant) {
    static_cast<Job*>(data)->work(participant);
  };
  if (useful <= 1 || shared.exchange(true, std::memory_order_acquire)) {
    job.work(0);
  } else {
    if (!run_on_openmp(useful, work, &job) && !pool().try_run(job, useful)) job.work(0);
    shared.store(false, std::memory_order_release);
  }
  job.rethrow();
}

}  // namespace convmixer_fast::cpu
