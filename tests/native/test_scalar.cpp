// SPDX-License-Identifier: Apache-2.0
//
// The 16-bit conversions, over every value there is.
#include <cmath>
#include <limits>

#include "check.hpp"

namespace {
#include "core/scalar.hpp"

// What 16 bits mean, from the definition of the format.
double meaning(uint16_t bits, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class S>
void check_format(int mantissa_bits, int bias) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const S value{(uint16_t)i};
    const double exact = meaning(value.bits, mantissa_bits, bias);
    CHECK_NEAR(widen(value), exact, 0.0, i);
    if (std::isnan(exact)) {
      const float back = widen(narrow<S>(widen(value)));
      CHECK(back != back);
    } else {
      CHECK(narrow<S>(widen(value)).bits == value.bits);
    }
  }
}

// Round to nearest, ties to even: at, just below and just above the middle of every two neighbours.
template <class S>
void check_rounding(uint16_t infinity) {
  for (uint16_t low = 0; low + 1 < infinity; ++low) {
    const uint16_t high = low + 1, even = low & 1 ? high : low;
    const float middle = (float)(0.5 * ((double)widen(S{low}) + (double)widen(S{high})));
    for (int sign = 0; sign < 2; ++sign) {
      const float s = sign ? -1.0f : 1.0f;
      const uint16_t bit = sign ? 0x8000 : 0;
      CHECK(narrow<S>(s * middle).bits == (even | bit));
      CHECK(narrow<S>(s * std::nextafterf(middle, 0.0f)).bits == (low | bit));
      CHECK(narrow<S>(s * std::nextafterf(middle, INFINITY)).bits == (high | bit));
    }
  }
  CHECK(narrow<S>(std::numeric_limits<float>::max()).bits == infinity);
  CHECK(narrow<S>(-INFINITY).bits == (infinity | 0x8000));
  CHECK(narrow<S>(-0.0f).bits == 0x8000);
}

}  // namespace

TEST(every_bfloat16_converts_and_returns) { check_format<bfloat16>(7, 127); }
TEST(every_float16_converts_and_returns) { check_format<float16>(10, 15); }
TEST(bfloat16_rounds_to_nearest_even) { check_rounding<bfloat16>(0x7f80); }
TEST(float16_rounds_to_nearest_even) { check_rounding<float16>(0x7c00); }
