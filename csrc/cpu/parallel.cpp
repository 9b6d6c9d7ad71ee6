// SPDX-License-Identifier: Apache-2.0
#include "cpu/parallel.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  void work(int64_t worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, worker);
  }
};

class Pool {
 public:
  // One job at a time: a second caller waits here, which is no slower than sharing the cores.
  void run(Job& job, int64_t helpers) {
    std::lock_guard<std::mutex> one_job(callers_);
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (started_ < helpers && start_worker()) {
      }
      if (helpers > started_) helpers = started_;
      job_ = &job;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> guard(mutex_);
    job_ = nullptr;  // a helper that wakes only now finds nothing: nobody waits for it, however busy the machine is
    done_.wait(guard, [&] { return running_ == 0; });
  }

 private:
  bool start_worker() {
    try {
      const int64_t worker = started_ + 1;
      const uint64_t seen = generation_;
      std::thread([this, worker, seen] { serve(worker, seen); }).detach();
      ++started_;
      return true;
    } catch (...) {  // out of threads: the ones we have do the work
      return false;
    }
  }

  void serve(int64_t worker, uint64_t seen) {
    std::unique_lock<std::mutex> guard(mutex_);
    for (;;) {
      wake_.wait(guard, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_ || !job_) continue;
      Job* job = job_;
      ++running_;
      guard.unlock();
      job->work(worker);
      guard.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int64_t started_ = 0, wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it gets a new pool.
// Registered when the library is loaded: a first call would do so under a lock that a concurrent fork() could copy.
std::atomic<Pool*> pool{nullptr};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

Pool& the_pool() {
  Pool* current = pool.load();
  if (current) return *current;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void rom_parallel_for(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (threads > tasks) threads = tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  Job job{body, context, tasks};
  the_pool().run(job, threads - 1);
}
