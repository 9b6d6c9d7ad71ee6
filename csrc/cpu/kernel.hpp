// SPDX-License-Identifier: Apache-2.0
//
// How a CPU kernel is written. Its file is compiled once per instruction set (ROM_ISA = base, avx2, avx512):
//
//   #include "cpu/kernel.hpp"
//   #include "rom/norm.h"
//   namespace {                    // all of it: a shared inline function built for AVX-512 could otherwise be the copy
//   #include "cpu/simd.hpp"        // the linker keeps for every set, an illegal instruction on older machines
//   ... the kernel, as templates over the storage type ...
//   }
//   ROM_CPU_KERNEL(rom_norm_forward, rom_norm_args) { ...; return ROM_OK; }      // `a` is the argument struct
//
// For the same reason nothing from the C++ standard library is used in such a file; a test looks at the objects.
#pragma once
// System headers, here at file scope: simd.hpp and scalar.hpp name them too, but inside an anonymous namespace.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/status.hpp"
#include "cpu/parallel.hpp"

#if defined(__x86_64__)
#define ROM_X86 1
#else
#define ROM_X86 0
#endif

// 0 base, 1 avx2, 2 avx512: the widest set this machine has and ROM_MAX_CPU_ISA allows.
int rom_cpu_isa_level();

#define ROM_PASTE_(a, b) a##_##b
#define ROM_PASTE(a, b) ROM_PASTE_(a, b)

#if defined(ROM_ISA_BASE) && ROM_X86
#define ROM_CPU_ENTRY(name, result, args_t)                                                       \
  extern "C" result name##_avx2(const args_t* args);                                              \
  extern "C" result name##_avx512(const args_t* args);                                            \
  extern "C" result name##_base(const args_t* args);                                              \
  extern "C" result name##_cpu(const args_t* args) {                                              \
    const int level = rom_cpu_isa_level();                                                        \
    return level == 2 ? name##_avx512(args) : level == 1 ? name##_avx2(args) : name##_base(args); \
  }
#elif defined(ROM_ISA_BASE)
#define ROM_CPU_ENTRY(name, result, args_t)          \
  extern "C" result name##_base(const args_t* args); \
  extern "C" result name##_cpu(const args_t* args) { return name##_base(args); }
#else
#define ROM_CPU_ENTRY(name, result, args_t)
#endif

#define ROM_CPU_KERNEL_(name, result, args_t)                                                             \
  ROM_CPU_ENTRY(name, result, args_t)                                                                     \
  static result ROM_PASTE(name, body)(const args_t& a);                                                   \
  extern "C" result ROM_PASTE(name, ROM_ISA)(const args_t* args) { return ROM_PASTE(name, body)(*args); } \
  static result ROM_PASTE(name, body)(const args_t& a)

// Defines `rom_status name_cpu(const args_t*)`.
#define ROM_CPU_KERNEL(name, args_t) ROM_CPU_KERNEL_(name, rom_status, args_t)
// Defines `int64_t name_workspace_cpu(const args_t*)`: bytes of scratch the kernel wants in `a.workspace`.
#define ROM_CPU_WORKSPACE(name, args_t) ROM_CPU_KERNEL_(name##_workspace, int64_t, args_t)
