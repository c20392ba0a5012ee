// A vector of floats, in the instruction set of the file that includes this. See isa.h.
//
// Include it only from sources that are compiled once per instruction set. Everything lies in an
// anonymous namespace or is always inlined, so that no copy of one can replace that of another.
// A tail of fewer than kWidth elements goes through a padded buffer on the stack.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

// gcc 12 takes the operand that its own unmasked AVX-512 intrinsics leave undefined for a mistake
// of ours (gcc bug 105593).
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sf {
namespace {

inline constexpr int32_t kSqrtHalf = 0x3f3504f3;  // the bits of sqrt(1/2)

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  static constexpr bool kFusesMultiplyAdd = true;
  __m512 v;
};

SF_ALWAYS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
SF_ALWAYS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
SF_ALWAYS_INLINE Vec load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
SF_ALWAYS_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
SF_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SF_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// Bit k is set where lane k of a equals that of b.
SF_ALWAYS_INLINE uint32_t equal_mask(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
// x where a < b, else 0.
SF_ALWAYS_INLINE Vec keep_less(Vec x, Vec a, Vec b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
SF_ALWAYS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// y 2^n where x >= low, else 0. The lowest nine bits of n_bits hold n; y and y 2^n are normal.
SF_ALWAYS_INLINE Vec times_exp2(Vec y, Vec n_bits, Vec x, Vec low) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n_bits.v), 23);
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, low.v, _CMP_GE_OQ);
  return {_mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(y.v), shifted))};
}
// n and f with x = 2^n f, sqrt(1/2) <= f < sqrt(2), for normal x > 0.
SF_ALWAYS_INLINE Vec split_exponent(Vec x, Vec* f) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalf)), 23);
  f->v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
  return {_mm512_cvtepi32_ps(n)};
}
SF_ALWAYS_INLINE void store(bf16* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i out = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  static constexpr bool kFusesMultiplyAdd = true;
  __m256 v;
};

SF_ALWAYS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
SF_ALWAYS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
SF_ALWAYS_INLINE Vec load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
SF_ALWAYS_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
SF_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SF_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
SF_ALWAYS_INLINE uint32_t equal_mask(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
SF_ALWAYS_INLINE Vec keep_less(Vec x, Vec a, Vec b) {
  return {_mm256_and_ps(x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
SF_ALWAYS_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
SF_ALWAYS_INLINE Vec times_exp2(Vec y, Vec n_bits, Vec x, Vec low) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n_bits.v), 23);
  const __m256i product = _mm256_add_epi32(_mm256_castps_si256(y.v), shifted);
  return {_mm256_and_ps(_mm256_castsi256_ps(product), _mm256_cmp_ps(x.v, low.v, _CMP_GE_OQ))};
}
SF_ALWAYS_INLINE Vec split_exponent(Vec x, Vec* f) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalf)), 23);
  f->v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
  return {_mm256_cvtepi32_ps(n)};
}
SF_ALWAYS_INLINE void store(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i out = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#else

// The compiler's own vectors, which it maps to those of the target (SSE2, NEON), or to scalars.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kWidth = 4;
  static constexpr bool kFusesMultiplyAdd = false;
  Float4 v;
};

SF_ALWAYS_INLINE Vec set1(float x) { return {Float4{x, x, x, x}}; }
SF_ALWAYS_INLINE Vec load(const float* p) {
  Vec out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}
SF_ALWAYS_INLINE Vec load(const bf16* p) {
  return {Float4{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])}};
}
SF_ALWAYS_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
SF_ALWAYS_INLINE void store(bf16* p, Vec a) {
  for (int k = 0; k < Vec::kWidth; ++k) p[k] = to_bf16(a.v[k]);
}
SF_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
SF_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
SF_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
SF_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Two roundings: std::fma is a call into libm where the target has no such instruction.
SF_ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
SF_ALWAYS_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
SF_ALWAYS_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
SF_ALWAYS_INLINE uint32_t equal_mask(Vec a, Vec b) {
  const Int4 equal = a.v == b.v;
  return static_cast<uint32_t>((equal[0] & 1) | (equal[1] & 2) | (equal[2] & 4) | (equal[3] & 8));
}
SF_ALWAYS_INLINE Vec keep_less(Vec x, Vec a, Vec b) { return {a.v < b.v ? x.v : Float4{}}; }
SF_ALWAYS_INLINE Vec abs(Vec a) {
  return {std::bit_cast<Float4>(std::bit_cast<Int4>(a.v) & 0x7fffffff)};
}
SF_ALWAYS_INLINE Vec times_exp2(Vec y, Vec n_bits, Vec x, Vec low) {
  const Uint4 shifted = std::bit_cast<Uint4>(n_bits.v) << 23;  // unsigned: wraps without complaint
  const Float4 product = std::bit_cast<Float4>(std::bit_cast<Uint4>(y.v) + shifted);
  return {x.v >= low.v ? product : Float4{}};
}
SF_ALWAYS_INLINE Vec split_exponent(Vec x, Vec* f) {
  const Int4 bits = std::bit_cast<Int4>(x.v);
  const Int4 n = (bits - kSqrtHalf) >> 23;
  f->v = std::bit_cast<Float4>(bits - (n << 23));
  return {__builtin_convertvector(n, Float4)};
}

#endif

// The first n < kWidth elements at p, the other lanes `pad`.
template <class T>
SF_ALWAYS_INLINE Vec load_tail(const T* p, int64_t n, float pad) {
  float lane[Vec::kWidth];
  for (int k = 0; k < Vec::kWidth; ++k) lane[k] = k < n ? to_f32(p[k]) : pad;
  return load(lane);
}

template <class T>
SF_ALWAYS_INLINE void store_tail(T* p, int64_t n, Vec a) {
  T lane[Vec::kWidth];
  store(lane, a);
  std::memcpy(p, lane, static_cast<size_t>(n) * sizeof(T));
}

SF_ALWAYS_INLINE float max_lane(Vec a) {
  float lane[Vec::kWidth];
  store(lane, a);
  float best = lane[0];
  for (int k = 1; k < Vec::kWidth; ++k) best = lane[k] > best ? lane[k] : best;
  return best;
}

SF_ALWAYS_INLINE double sum_lanes(Vec a) {
  float lane[Vec::kWidth];
  store(lane, a);
  double sum = 0;
  for (int k = 0; k < Vec::kWidth; ++k) sum += static_cast<double>(lane[k]);
  return sum;
}

// e^(d / tau) for d <= 0; 0 where that is not a normal float. The temperature costs nothing: it is
// in the constants.
//
// d = n tau ln 2 + r with |r| <= tau ln(2) / 2, then a polynomial in r / tau of degree 6: the one
// whose largest relative error, 3.1e-9, is least. The relative error is below 2^-23; to that comes,
// as tau ln 2 is rounded, |d| 2.7e-9 at tau = 1 where multiplication and addition are fused, and
// |d / tau| 6e-8 at any other tau, as much as rounding d / tau itself would cost.
class Exp {
 public:
  explicit Exp(double tau)
      : per_ln2_(of(1.4426950408889634 / tau)),
        ln2_(of(kLn2 * tau)),
        ln2_hi_(set1(leading_bits(kLn2 * tau))),
        ln2_lo_(of(kLn2 * tau - leading_bits(kLn2 * tau))),
        lowest_(of(-87.3 * tau)),
        c1_(of(1 / tau)),
        c2_(of(4.999999343e-1 / tau / tau)),
        c3_(of(1.666652040e-1 / tau / tau / tau)),
        c4_(of(4.166839079e-2 / tau / tau / tau / tau)),
        c5_(of(8.368745108e-3 / tau / tau / tau / tau / tau)),
        c6_(of(1.381454007e-3 / tau / tau / tau / tau / tau / tau)) {}

  SF_ALWAYS_INLINE Vec operator()(Vec d) const {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    const Vec n_bits = fma(d, per_ln2_, set1(kRound));
    const Vec minus_n = set1(kRound) - n_bits;
    Vec r;
    if constexpr (Vec::kFusesMultiplyAdd) {
      r = fma(minus_n, ln2_, d);
    } else {
      r = fma(minus_n, ln2_lo_, fma(minus_n, ln2_hi_, d));
    }
    Vec y = fma(c6_, r, c5_);
    y = fma(y, r, c4_);
    y = fma(y, r, c3_);
    y = fma(y, r, c2_);
    y = fma(y, r, c1_);
    y = fma(y, r, set1(1));
    return times_exp2(y, n_bits, d, lowest_);
  }

 private:
  static constexpr double kLn2 = 0.6931471805599453;
  static SF_ALWAYS_INLINE Vec of(double x) { return set1(static_cast<float>(x)); }
  // Few enough that its product with n is exact.
  static SF_ALWAYS_INLINE float leading_bits(double x) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(static_cast<float>(x)) & 0xfffff000u);
  }

  Vec per_ln2_, ln2_, ln2_hi_, ln2_lo_, lowest_, c1_, c2_, c3_, c4_, c5_, c6_;
};

SF_ALWAYS_INLINE Vec exp_nonpositive(Vec x) { return Exp(1)(x); }

// log x for normal x > 0, its relative error below 2^-23. x = 2^n (1 + r), then log(1 + r) = r -
// r^2 / 2 + r^3 P(r) with the P of degree 7 whose largest relative error, 5.8e-9, is least.
SF_ALWAYS_INLINE Vec log_positive(Vec x) {
  Vec f;
  const Vec n = split_exponent(x, &f);
  const Vec r = f - set1(1.0f);
  Vec p = fma(set1(-7.634499325e-2f), r, set1(1.276157816e-1f));
  p = fma(p, r, set1(-1.316018186e-1f));
  p = fma(p, r, set1(1.420175781e-1f));
  p = fma(p, r, set1(-1.662335738e-1f));
  p = fma(p, r, set1(2.000122689e-1f));
  p = fma(p, r, set1(-2.500082103e-1f));
  p = fma(p, r, set1(3.333333171e-1f));
  p = fma(p, r, set1(-0.5f));
  constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;  // n kLn2Hi is exact
  const Vec small = fma(p * r, r, n * set1(kLn2Lo));
  return fma(n, set1(kLn2Hi), r + small);
}

}  // namespace
}  // namespace sf
