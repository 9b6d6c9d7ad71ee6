// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "rom/abi.h"

// Stores the message behind rom_last_error() and returns `status`, so that a check is one line:
//   if (a.u.ndim != 3) return rom_fail(ROM_BAD_ARGUMENT, "u: expected 3 dimensions, got %d", a.u.ndim);
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
rom_status rom_fail(rom_status status, const char* format, ...);

// Empties the message; called by the bindings before a kernel runs.
void rom_clear_error();
