// e4m3fn and f16 by bit arithmetic, and the scale of a row. Shared by all backends. Internal.
#pragma once

#include <bit>
#include <cstdint>

#include "core/dtype.h"

#if defined(__CUDACC__) || defined(SF_EMU)
#define SF_WIRE_FN __host__ __device__ __forceinline__
#else
#define SF_WIRE_FN SF_ALWAYS_INLINE
#endif

namespace sf::fp8 {

struct f16 {
  uint16_t bits;
};

constexpr float kMax = 448.0f;
constexpr float kMinAmax = 0x1.cp-118f;  // 448 * 2^-126
constexpr uint32_t kQuietNan = 0x7fc00000;
constexpr uint8_t kNanCode = 0x7f;

SF_WIRE_FN uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}

SF_WIRE_FN float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// |x| as bits of T: they order as the magnitudes do, infinity and NaN on top.
SF_WIRE_FN uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffff; }
SF_WIRE_FN uint32_t magnitude(bf16 x) { return x.bits & 0x7fffu; }
SF_WIRE_FN uint32_t magnitude(f16 x) { return x.bits & 0x7fffu; }

template <class T>
constexpr uint32_t kInfinity = 0x7f80;
template <>
inline constexpr uint32_t kInfinity<float> = 0x7f800000;
template <>
inline constexpr uint32_t kInfinity<f16> = 0x7c00;

// v >> shift, to nearest, ties to even. 1 <= shift <= 31
SF_WIRE_FN uint32_t shift_right_rounded(uint32_t v, uint32_t shift) {
  return (v + ((1u << (shift - 1)) - 1) + ((v >> shift) & 1)) >> shift;
}

SF_WIRE_FN uint8_t encode(float x) {
  const uint32_t bits = bits_of(x), mag = bits & 0x7fffffff;
  const uint32_t sign = bits >> 24 & 0x80;
  const uint32_t exponent = mag >> 23;
  uint32_t code = 0;
  if (mag > 0x7f800000) {
    code = kNanCode;
  } else if (mag >= 0x43e00000) {  // 448
    code = 0x7e;
  } else if (exponent >= 121) {  // 2^-6, the smallest normal: only the bias differs, by 120
    code = shift_right_rounded(mag, 20) - (120u << 3);
  } else if (exponent >= 117) {  // above 2^-10, half of the smallest subnormal, 2^-9
    code = shift_right_rounded((mag & 0x7fffff) | 0x800000, 141 - exponent);
  }
  return static_cast<uint8_t>(sign | code);
}

SF_WIRE_FN float decode(uint8_t code) {
  const uint32_t sign = uint32_t{code} << 24 & 0x80000000, mag = code & 0x7fu;
  if (mag == kNanCode) return float_of(sign | 0x7ff00000);
  if (mag < 8) return float_of(sign | bits_of(static_cast<float>(mag) * 0x1p-9f));
  return float_of(sign | ((mag << 20) + (120u << 23)));
}

SF_WIRE_FN float widen(float x) { return x; }
SF_WIRE_FN float widen(bf16 x) { return float_of(uint32_t{x.bits} << 16); }
SF_WIRE_FN float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, mag = x.bits & 0x7fffu;
  if (mag < 0x400) return float_of(sign | bits_of(static_cast<float>(mag) * 0x1p-24f));
  const uint32_t bias = mag >= 0x7c00 ? (255 - 31) : (127 - 15);
  return float_of(sign | ((mag << 13) + (bias << 23)));
}

SF_WIRE_FN void narrow(float x, float& out) { out = x; }
SF_WIRE_FN void narrow(float x, bf16& out) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out.bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : shift_right_rounded(bits, 16));
}
SF_WIRE_FN void narrow(float x, f16& out) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, mag = bits & 0x7fffffff;
  const uint32_t exponent = mag >> 23;
  uint32_t half = 0;
  if (mag > 0x7f800000) {
    half = 0x7e00;
  } else if (mag >= 0x477ff000) {  // 65520 rounds to infinity
    half = 0x7c00;
  } else if (exponent >= 113) {
    half = shift_right_rounded(mag, 13) - (112u << 10);
  } else if (exponent >= 102) {  // 2^-25, half of the smallest subnormal
    half = shift_right_rounded((mag & 0x7fffff) | 0x800000, 126 - exponent);
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

struct RowScale {
  float scale, inv;
};

// amax >= 0 and finite
SF_WIRE_FN RowScale row_scale(float amax) {
  if (amax == 0) return {1.0f, 1.0f};
  const float scale = (amax > kMinAmax ? amax : kMinAmax) / kMax;
  return {scale, 1.0f / scale};
}

}  // namespace sf::fp8
