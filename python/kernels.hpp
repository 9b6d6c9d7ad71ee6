// SPDX-License-Identifier: Apache-2.0
//
// The table between Python keyword arguments and the C ABI's structs. A family's file in this folder lists, per kernel,
// the fields of its struct; module.cpp turns the list into functions. No logic lives here, and no pybind11: adding a
// kernel recompiles in a blink. The files are compiled once per module (ROM_DEVICE = cpu or cuda).
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "rom/abi.h"

namespace rom {

enum class Kind { tensor, integer, real };

struct Field {
  const char* name;
  Kind kind;
  std::size_t offset;
};

struct Kernel {
  const char* name;
  std::size_t args_bytes, launch_offset;
  std::vector<Field> fields;
  rom_status (*run)(const void*);
  std::int64_t (*workspace)(const void*);  // null: the kernel needs none
};

std::vector<Kernel>& kernels();

struct Register {
  explicit Register(Kernel kernel) {
    if (kernel.run) kernels().push_back(static_cast<Kernel&&>(kernel));
  }
};

}  // namespace rom

#define ROM_PASTE_(a, b) a##_##b
#define ROM_PASTE(a, b) ROM_PASTE_(a, b)

// Every kernel has a CPU version. A CUDA one may not exist yet: declared weak, it is then null and not listed.
#if defined(ROM_CPU_MODULE)
#define ROM_MAYBE_MISSING
#else
#define ROM_MAYBE_MISSING __attribute__((weak))
#endif
#define ROM_DECLARE(name) \
  extern "C" ROM_MAYBE_MISSING rom_status ROM_PASTE(rom_##name, ROM_DEVICE)(const rom_##name##_args*);
#define ROM_DECLARE_WORKSPACE(name) \
  extern "C" ROM_MAYBE_MISSING int64_t ROM_PASTE(rom_##name##_workspace, ROM_DEVICE)(const rom_##name##_args*);

#define ROM_KERNEL_(name, workspace, ...)                                                           \
  static const rom::Register register_##name(                                                       \
      rom::Kernel{#name,                                                                            \
                  sizeof(rom_##name##_args),                                                        \
                  offsetof(rom_##name##_args, launch),                                              \
                  {__VA_ARGS__},                                                                    \
                  reinterpret_cast<rom_status (*)(const void*)>(ROM_PASTE(rom_##name, ROM_DEVICE)), \
                  (std::int64_t (*)(const void*))(workspace)})

// ROM_KERNEL(norm_forward, TENSOR(x), REAL(eps), ...) after `#define ARGS rom_norm_forward_args`.
#define ROM_KERNEL(name, ...) ROM_DECLARE(name) ROM_KERNEL_(name, nullptr, __VA_ARGS__)
#define ROM_KERNEL_WITH_WORKSPACE(name, ...) \
  ROM_DECLARE(name)                          \
  ROM_DECLARE_WORKSPACE(name) ROM_KERNEL_(name, ROM_PASTE(rom_##name##_workspace, ROM_DEVICE), __VA_ARGS__)

#define TENSOR(field) {#field, rom::Kind::tensor, offsetof(ARGS, field)}
#define INTEGER(field) {#field, rom::Kind::integer, offsetof(ARGS, field)}
#define REAL(field) {#field, rom::Kind::real, offsetof(ARGS, field)}
