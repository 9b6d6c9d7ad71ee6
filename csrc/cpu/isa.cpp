// SPDX-License-Identifier: Apache-2.0
#include "cpu/kernel.hpp"

#include <stdlib.h>
#include <string.h>

namespace {

int detect() {
  const char* cap = getenv("ROM_MAX_CPU_ISA");
  const int limit = !cap ? 2 : !strcmp(cap, "base") ? 0 : !strcmp(cap, "avx2") ? 1 : 2;
#if ROM_X86
  __builtin_cpu_init();
  // F16C comes with every AVX2 machine (and older clangs cannot ask for it by name).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const int best = avx512 ? 2 : avx2 ? 1 : 0;
#else
  const int best = 0;
#endif
  return best < limit ? best : limit;
}

}  // namespace

int rom_cpu_isa_level() {
  static const int level = detect();
  return level;
}

extern "C" const char* rom_cpu_isa(void) {
  static const char* const names[] = {"base", "avx2", "avx512"};
  return names[rom_cpu_isa_level()];
}
