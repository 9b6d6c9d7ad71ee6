// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"

#include <cmath>
#include <cstdio>
#include <vector>

#include "rom/abi.h"

namespace {

struct Named {
  const char* name;
  TestBody body;
};

std::vector<Named>& tests() {
  static std::vector<Named> all;
  return all;
}

int failures = 0;
constexpr int kShown = 20;

}  // namespace

TestCase::TestCase(const char* name, TestBody body) { tests().push_back({name, body}); }

void check_failed(const char* file, int line, const char* what) {
  if (++failures <= kShown) std::printf("  %s:%d: failed: %s\n", file, line, what);
}

void check_near(const char* file, int line, const char* what, double got, double expected, double tolerance,
                double at) {
  if (std::isnan(got) && std::isnan(expected)) return;
  if (got == expected || std::fabs(got - expected) <= tolerance * std::fmax(1.0, std::fabs(expected))) return;
  if (++failures <= kShown)
    std::printf("  %s:%d: %s = %.9g, expected %.9g (tolerance %.1e) at %.9g\n", file, line, what, got, expected,
                tolerance, at);
}

void check_relative(const char* file, int line, const char* what, double got, double expected, double tolerance,
                    double at) {
  if (got == expected || std::fabs(got - expected) <= tolerance * std::fabs(expected)) return;
  if (++failures <= kShown)
    std::printf("  %s:%d: %s = %.9g, expected %.9g (relative tolerance %.1e) at %.9g\n", file, line, what, got,
                expected, tolerance, at);
}

int main() {
  std::printf("native tests, CPU kernels on %s\n", rom_cpu_isa());
  for (const Named& test : tests()) {
    const int before = failures;
    test.body();
    std::printf("%-6s %s\n", failures == before ? "ok" : "FAILED", test.name);
  }
  std::printf("%zu tests, %d failed checks\n", tests().size(), failures);
  return failures != 0;
}
