// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "cpu/parallel.hpp"

namespace {

struct Counts {
  explicit Counts(int64_t tasks, int64_t threads) : runs(tasks), threads(threads) {}
  std::vector<std::atomic<int>> runs;
  int64_t threads;
  std::atomic<bool> worker_in_range{true};
};

void count(void* context, int64_t task, int64_t worker) {
  auto& counts = *static_cast<Counts*>(context);
  counts.runs[task].fetch_add(1);
  if (worker < 0 || worker >= counts.threads) counts.worker_in_range = false;
}

bool every_task_ran_once(int64_t tasks, int64_t threads) {
  Counts counts(tasks, threads);
  rom_parallel_for(tasks, threads, count, &counts);
  bool once = counts.worker_in_range;
  for (auto& runs : counts.runs) once = once && runs == 1;
  return once;
}

}  // namespace

TEST(every_task_runs_once_whatever_the_thread_count) {
  for (int repeat = 0; repeat < 50; ++repeat)
    for (int64_t tasks : {0, 1, 2, 7, 1000})
      for (int64_t threads : {1, 2, 3, 8}) CHECK(every_task_ran_once(tasks, threads));
}

TEST(callers_on_several_threads_do_not_disturb_each_other) {
  std::atomic<int> good{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat) good += every_task_ran_once(64, 3);
    });
  for (auto& caller : callers) caller.join();
  CHECK(good == 200);
}

#ifndef ROM_TESTS_EMULATED  // qemu-user cannot fork a process that has threads
// The child has none of the pool's threads; a pool that waited for them would hang here for ever.
TEST(a_forked_child_gets_a_pool_of_its_own) {
  CHECK(every_task_ran_once(64, 3));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(every_task_ran_once(64, 3) ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#endif
