// kBlock elements at a time, in the instruction set of the file that includes this:
//   encode_block(x, inv, codes)           x * inv is finite and at most 448 * (1 + 2^-22)
//   decode_block<kStreams>(codes, by, y)  no code is NaN; by = 256 * scale, finite
// Included by fp8_rows_cpu_impl.h alone. Every name has internal linkage: see core/dtype.h.
//
// How a code comes out of one addition. Let |v| lie in [2^e, 2^(e+1)), e >= -6, or below with
// e = -6. In 2^(e+20) + |v| the unit of the last place is 2^(e-3), so the hardware rounds |v| to
// e4m3's mantissa, ties to even, subnormals included, and the low bits of the sum count those
// units: 8 to 16, or 0 to 16 where e = -6. Add 8 (e + 6) of them beforehand, which is an even
// number and so changes no tie, and the lowest byte of the sum is the code.
//
// How a value comes out of a shift. A code's 7 bits, put below the sign of an f16, are that f16
// whose value is 2^-8 of the code's, subnormals included; the hardware widens it exactly.
#pragma once

#include "core/simd.h"
#include "wire/fp8_convert.h"

namespace sf::cpu {
namespace {

using fp8::f16;

#if defined(__AVX2__)

constexpr int kExponents = 0x7f800000;
constexpr int kLowest = 121 << 23;                    // 2^-6, as bits
constexpr int kUnits = (20 << 23) - (kLowest >> 20);  // 2^20, less 8 * (-6) in units of its own
constexpr int16_t kF16Code = static_cast<int16_t>(0xbf80);  // where a code lies in an f16

#endif

#if defined(__AVX512F__)

constexpr int kBlock = 64;

// The lowest byte of each lane is the code of a * inv. a >= 0
SF_ALWAYS_INLINE __m512i code_of(__m512i a, __m512 inv) {
  __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(a), inv);
  asm("" : "+v"(v));  // the product is rounded: it must not become part of an fma
  __m512i e = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(kExponents));
  e = _mm512_max_epi32(e, _mm512_set1_epi32(kLowest));
  const __m512i base =
      _mm512_add_epi32(_mm512_add_epi32(e, _mm512_srli_epi32(e, 20)), _mm512_set1_epi32(kUnits));
  return _mm512_castps_si512(_mm512_add_ps(v, _mm512_castsi512_ps(base)));
}

// Bits of a where those of the mask are set, else of b.
SF_ALWAYS_INLINE __m512i select(uint32_t mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(static_cast<int>(mask)), 0xe4);
}

SF_ALWAYS_INLINE void store_codes(uint8_t* codes, __m512i magnitudes, __mmask64 negative) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  _mm512_storeu_si512(codes, _mm512_mask_add_epi8(magnitudes, negative, magnitudes, sign));
}

// The lowest bytes of four times 16 lanes, in order.
SF_ALWAYS_INLINE __m512i join_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i low = select(0xff, a, _mm512_slli_epi32(b, 8));
  const __m512i high = select(0xffffff, _mm512_slli_epi32(c, 16), _mm512_slli_epi32(d, 24));
  const __m512i mixed = select(0xffff, low, high);
  const __m512i turn =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(mixed, turn));
}

SF_ALWAYS_INLINE void encode_block(const float* x, float inv, uint8_t* codes) {
  const __m512 by = _mm512_set1_ps(inv);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i code[4];
  uint64_t negative = 0;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512i bits = _mm512_loadu_si512(x + 16 * k);
    negative |= uint64_t{_mm512_movepi32_mask(bits)} << (16 * k);
    code[k] = code_of(_mm512_and_si512(bits, magnitude), by);
  }
  store_codes(codes, join_bytes(code[0], code[1], code[2], code[3]), negative);
}

SF_ALWAYS_INLINE void encode_block(const bf16* x, float inv, uint8_t* codes) {
  const __m512 by = _mm512_set1_ps(inv);
  __m512i pairs[2];
  uint64_t negative = 0;
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512i bits = _mm512_loadu_si512(x + 32 * k);
    negative |= uint64_t{_mm512_movepi16_mask(bits)} << (32 * k);
    const __m512i a = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    const __m512i even = code_of(_mm512_slli_epi32(a, 16), by);
    const __m512i odd =
        code_of(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000))), by);
    pairs[k] = select(0xff, even, _mm512_slli_epi32(odd, 8));
  }
  const __m512i evens =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                       24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  store_codes(codes, _mm512_permutex2var_epi16(pairs[0], evens, pairs[1]), negative);
}

SF_ALWAYS_INLINE void encode_block(const f16* x, float inv, uint8_t* codes) {
  const __m512 by = _mm512_set1_ps(inv);
  __m512i code[4];
  uint64_t negative = 0;
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512i bits = _mm512_loadu_si512(x + 32 * k);
    negative |= uint64_t{_mm512_movepi16_mask(bits)} << (32 * k);
    const __m512i a = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
    const auto half = [&](__m256i h) {
      return code_of(_mm512_castps_si512(_mm512_cvtph_ps(h)), by);
    };
    code[2 * k] = half(_mm512_castsi512_si256(a));
    code[2 * k + 1] = half(_mm512_extracti64x4_epi64(a, 1));
  }
  store_codes(codes, join_bytes(code[0], code[1], code[2], code[3]), negative);
}

template <bool kStreams>
SF_ALWAYS_INLINE void put(void* to, __m512i bits) {
  if constexpr (kStreams) {
    _mm512_stream_si512(static_cast<__m512i*>(to), bits);
  } else {
    _mm512_storeu_si512(to, bits);
  }
}

SF_ALWAYS_INLINE __m512 widened(__m256i halves, __m512 by) {
  return _mm512_mul_ps(_mm512_cvtph_ps(halves), by);
}

// 32 codes in order as f16
SF_ALWAYS_INLINE __m512i halves_of(const uint8_t* codes) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7),
                          _mm512_set1_epi16(kF16Code));
}

template <bool kStreams>
SF_ALWAYS_INLINE void decode_block(const uint8_t* codes, float by, float* y) {
  const __m512 scale = _mm512_set1_ps(by);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512i h = halves_of(codes + 32 * k);
    const __m512 low = widened(_mm512_castsi512_si256(h), scale);
    const __m512 high = widened(_mm512_extracti64x4_epi64(h, 1), scale);
    put<kStreams>(y + 32 * k, _mm512_castps_si512(low));
    put<kStreams>(y + 32 * k + 16, _mm512_castps_si512(high));
  }
}

// f32 to the upper 16 bits, to nearest even; the lower ones are left as they come. Not for NaN.
SF_ALWAYS_INLINE __m512i rounded_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

template <bool kStreams>
SF_ALWAYS_INLINE void decode_block(const uint8_t* codes, float by, bf16* y) {
  const __m512 scale = _mm512_set1_ps(by);
  const __m512i mask = _mm512_set1_epi16(kF16Code);
  const __m512i pairs = _mm512_loadu_si512(codes);  // each 16 bits: an even code and an odd one
  const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(pairs, 1), mask);
  const __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(pairs, 8), 1), mask);
  const auto joined = [&](__m256i evens, __m256i odds) {
    const __m512i low = rounded_to_bf16(widened(evens, scale));
    const __m512i high = rounded_to_bf16(widened(odds, scale));
    return select(0xffff, _mm512_srli_epi32(low, 16), high);
  };
  put<kStreams>(y, joined(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
  put<kStreams>(y + 32,
                joined(_mm512_extracti64x4_epi64(even, 1), _mm512_extracti64x4_epi64(odd, 1)));
}

template <bool kStreams>
SF_ALWAYS_INLINE void decode_block(const uint8_t* codes, float by, f16* y) {
  const __m512 scale = _mm512_set1_ps(by);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m512i h = halves_of(codes + 32 * k);
    const __m256i low = _mm512_cvtps_ph(widened(_mm512_castsi512_si256(h), scale), 0);
    const __m256i high = _mm512_cvtps_ph(widened(_mm512_extracti64x4_epi64(h, 1), scale), 0);
    put<kStreams>(y + 32 * k, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
}

#elif defined(__AVX2__)

constexpr int kBlock = 32;

SF_ALWAYS_INLINE __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
SF_ALWAYS_INLINE __m256 load8(const bf16* x) { return load(x).v; }
SF_ALWAYS_INLINE __m256 load8(const f16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// Each lane is a code, sign included.
SF_ALWAYS_INLINE __m256i code_of(__m256 x, __m256 inv) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), bits = _mm256_castps_si256(x);
  __m256 v = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(bits, magnitude)), inv);
  asm("" : "+x"(v));  // the product is rounded: it must not become part of an fma
  __m256i e = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(kExponents));
  e = _mm256_max_epi32(e, _mm256_set1_epi32(kLowest));
  const __m256i base =
      _mm256_add_epi32(_mm256_add_epi32(e, _mm256_srli_epi32(e, 20)), _mm256_set1_epi32(kUnits));
  const __m256i sum = _mm256_castps_si256(_mm256_add_ps(v, _mm256_castsi256_ps(base)));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  return _mm256_or_si256(_mm256_and_si256(sum, _mm256_set1_epi32(0xff)), sign);
}

template <class T>
SF_ALWAYS_INLINE void encode_block(const T* x, float inv, uint8_t* codes) {
  const __m256 by = _mm256_set1_ps(inv);
  const __m256i a = code_of(load8(x), by), b = code_of(load8(x + 8), by);
  const __m256i c = code_of(load8(x + 16), by), d = code_of(load8(x + 24), by);
  const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm256_permutevar8x32_epi32(packed, order));
}

template <bool kStreams>
SF_ALWAYS_INLINE void put(void* to, __m256i bits) {
  if constexpr (kStreams) {
    _mm256_stream_si256(static_cast<__m256i*>(to), bits);
  } else {
    _mm256_storeu_si256(static_cast<__m256i*>(to), bits);
  }
}

template <bool kStreams>
SF_ALWAYS_INLINE void put16(float* y, __m256 low, __m256 high) {
  put<kStreams>(y, _mm256_castps_si256(low));
  put<kStreams>(y + 8, _mm256_castps_si256(high));
}

SF_ALWAYS_INLINE __m256i rounded_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
}

template <bool kStreams>
SF_ALWAYS_INLINE void put16(bf16* y, __m256 low, __m256 high) {
  const __m256i packed = _mm256_packus_epi32(rounded_to_bf16(low), rounded_to_bf16(high));
  put<kStreams>(y, _mm256_permute4x64_epi64(packed, 0xd8));
}

template <bool kStreams>
SF_ALWAYS_INLINE void put16(f16* y, __m256 low, __m256 high) {
  put<kStreams>(y, _mm256_set_m128i(_mm256_cvtps_ph(high, 0), _mm256_cvtps_ph(low, 0)));
}

template <bool kStreams, class T>
SF_ALWAYS_INLINE void decode_block(const uint8_t* codes, float by, T* y) {
  const __m256 scale = _mm256_set1_ps(by);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * k));
    const __m256i h = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                       _mm256_set1_epi16(kF16Code));
    const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    const __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
    put16<kStreams>(y + 16 * k, _mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale));
  }
}

#else

constexpr int kBlock = 16;

template <class T>
SF_ALWAYS_INLINE void encode_block(const T* x, float inv, uint8_t* codes) {
  for (int k = 0; k < kBlock; ++k) codes[k] = fp8::encode(fp8::widen(x[k]) * inv);
}

template <bool kStreams, class T>
SF_ALWAYS_INLINE void decode_block(const uint8_t* codes, float by, T* y) {
  for (int k = 0; k < kBlock; ++k) fp8::narrow(fp8::decode(codes[k]) * 0x1p-8f * by, y[k]);
}

#endif

}  // namespace
}  // namespace sf::cpu
