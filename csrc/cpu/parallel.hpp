// SPDX-License-Identifier: Apache-2.0
//
// A thread pool that sleeps when idle (so it never spins against torch's), survives fork() (a forked child makes its
// own), and hands out tasks one by one. Results must not depend on which thread runs a task: kernels write per task and
// sum partial results in task order.
#pragma once
#include <stdint.h>

// Runs body(context, task, worker) for every task in [0, tasks); worker is in [0, threads).
void rom_parallel_for(int64_t tasks, int64_t threads, void (*body)(void*, int64_t, int64_t), void* context);
