// SPDX-License-Identifier: Apache-2.0
#include "core/status.hpp"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char message[1024] = "";
}

rom_status rom_fail(rom_status status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message, sizeof(message), format, values);
  va_end(values);
  return status;
}

void rom_clear_error() { message[0] = '\0'; }

extern "C" const char* rom_last_error(void) { return message; }
