// SPDX-License-Identifier: Apache-2.0
//
// A test framework in one screen: TEST(name) { ... CHECK(condition) ... CHECK_NEAR(got, expected, tolerance, at) ... }.
// Nothing here is inline: files compiled per instruction set include it too (see csrc/cpu/kernel.hpp).
#pragma once

using TestBody = void (*)();

struct TestCase {
  TestCase(const char* name, TestBody body);
};

// Reports and counts a failure; the test goes on, so that one run shows all of them.
void check_failed(const char* file, int line, const char* what);
// |got - expected| <= tolerance * max(1, |expected|); NaN must meet NaN. `at` is the argument, for the message.
void check_near(const char* file, int line, const char* what, double got, double expected, double tolerance, double at);
// |got - expected| <= tolerance * |expected|.
void check_relative(const char* file, int line, const char* what, double got, double expected, double tolerance,
                    double at);

#define TEST(name)                                       \
  static void test_##name();                             \
  static const TestCase case_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                            \
  do {                                                              \
    if (!(condition)) check_failed(__FILE__, __LINE__, #condition); \
  } while (0)
#define CHECK_NEAR(got, expected, tolerance, at) check_near(__FILE__, __LINE__, #got, got, expected, tolerance, at)
#define CHECK_RELATIVE(got, expected, tolerance, at) \
  check_relative(__FILE__, __LINE__, #got, got, expected, tolerance, at)
