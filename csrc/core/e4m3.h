// The 8-bit float e4m3fn: 4 exponent bits of bias 7, 3 mantissa bits, no infinities, NaN = 0x7f and
// 0xff. Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433, table 1.
#pragma once

#include <bit>
#include <cstdint>

namespace sf {

// Exact: every value is a float32. constexpr, so that device code may call it too.
constexpr float e4m3_to_f32(uint8_t code) {
  const uint32_t sign = uint32_t{code} >> 7 << 31;
  const uint32_t exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0.001953125f;  // 2^-9
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 120) << 23 | mantissa << 20);
}

}  // namespace sf
