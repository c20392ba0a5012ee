// Included by fp8_rows_cpu.cpp and its _avx2 and _avx512 sisters, each compiled for its own ISA.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "wire/fp8_blocks.h"
#include "wire/fp8_rows_cpu.h"

namespace sf::cpu {
namespace {

// As unsigned integers of T's size, so that the compiler's vectors have as many lanes as fit.
SF_ALWAYS_INLINE uint32_t as_lane(float x) { return fp8::magnitude(x); }
SF_ALWAYS_INLINE uint16_t as_lane(bf16 x) { return static_cast<uint16_t>(fp8::magnitude(x)); }
SF_ALWAYS_INLINE uint16_t as_lane(f16 x) { return static_cast<uint16_t>(fp8::magnitude(x)); }

template <class T>
uint32_t max_magnitude(const T* x, int64_t width) {
  decltype(as_lane(T{})) most = 0;
  for (int64_t i = 0; i < width; ++i) most = std::max(most, as_lane(x[i]));
  return most;
}

SF_ALWAYS_INLINE float value_of(uint32_t magnitude, float) { return fp8::float_of(magnitude); }
template <class T>
SF_ALWAYS_INLINE float value_of(uint32_t magnitude, T) {
  return fp8::widen(T{static_cast<uint16_t>(magnitude)});
}

template <class T>
void encode_row(const T* x, int64_t width, float inv, uint8_t* codes) {
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock) encode_block(x + i, inv, codes + i);
  if (i == width) return;
  T rest[kBlock] = {};
  uint8_t rest_codes[kBlock];
  std::memcpy(rest, x + i, static_cast<size_t>(width - i) * sizeof(T));
  encode_block(rest, inv, rest_codes);
  std::memcpy(codes + i, rest_codes, static_cast<size_t>(width - i));
}

template <class T>
float pack_row(const T* x, int64_t width, uint8_t* codes) {
  const uint32_t most = max_magnitude(x, width);
  if (most >= fp8::kInfinity<T>) {
    std::fill_n(codes, width, fp8::kNanCode);
    return fp8::float_of(fp8::kQuietNan);
  }
  const fp8::RowScale by = fp8::row_scale(value_of(most, T{}));
  encode_row(x, width, by.inv, codes);
  return by.scale;
}

bool has_nan(const uint8_t* codes, int64_t width) {
  uint8_t any = 0;
  for (int64_t i = 0; i < width; ++i) any |= (codes[i] & 0x7f) == fp8::kNanCode;
  return any != 0;
}

template <bool kStreams, class T>
void decode_row(const uint8_t* codes, int64_t width, float by, T* y) {
  int64_t i = 0;
  for (; i + kBlock <= width; i += kBlock) decode_block<kStreams>(codes + i, by, y + i);
  if (i == width) return;
  uint8_t rest[kBlock] = {};
  alignas(64) T rest_y[kBlock];
  std::memcpy(rest, codes + i, static_cast<size_t>(width - i));
  decode_block<false>(rest, by, rest_y);
  std::memcpy(y + i, rest_y, static_cast<size_t>(width - i) * sizeof(T));
}

template <class T>
void unpack_row(const uint8_t* codes, int64_t width, float scale, T* y, bool streams) {
  // 256 * scale must be exact, and no code or scale NaN; `!` so that a NaN fails.
  if (!(std::fabs(scale) < 0x1p119f) || has_nan(codes, width)) {
    for (int64_t i = 0; i < width; ++i) fp8::narrow(fp8::decode(codes[i]) * scale, y[i]);
    return;
  }
  if (streams && reinterpret_cast<uintptr_t>(y) % 64 == 0) {
    decode_row<true>(codes, width, 256 * scale, y);
#if defined(__AVX2__)
    _mm_sfence();
#endif
  } else {
    decode_row<false>(codes, width, 256 * scale, y);
  }
}

// Blocks want finite values up to 448: what lies outside is put right around them.
void encode_all(const float* x, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, n - i);
    float inside[kBlock];
    for (int64_t k = 0; k < size; ++k) {
      const float a = std::fabs(x[i + k]);
      inside[k] = std::copysign(a <= fp8::kMax ? a : fp8::kMax, x[i + k]);
    }
    encode_row(inside, size, 1.0f, codes + i);
    for (int64_t k = 0; k < size; ++k) {
      if (std::isnan(x[i + k])) codes[i + k] = codes[i + k] | fp8::kNanCode;
    }
  }
}

constexpr Fp8Kernels kKernels{{pack_row<float>, unpack_row<float>},
                              {pack_row<bf16>, unpack_row<bf16>},
                              {pack_row<f16>, unpack_row<f16>},
                              encode_all};

}  // namespace
}  // namespace sf::cpu
