#include "core/crc32c_fold.h"

#if defined(__x86_64__)

// gcc 12 takes the operand that its own AVX-512 intrinsics leave undefined for a mistake of ours
// (gcc bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "core/crc32c_gf2.h"

// Source: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
// Instruction", Intel, 2009. A 128-bit lane holds a polynomial, its first byte the highest powers.
// "Folding over d bits" replaces the lane by one congruent to it times x^d, and adds the 128 bits
// that lie d bits further on:
//   (high x^64 + low) x^d = high (x^(d+64) mod P) + low (x^d mod P)
// The register stores bits reflected, which multiplies each product by x: hence d - 1 below.
#define SF_FOLD __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2")))
#define SF_FOLD_INLINE SF_FOLD inline __attribute__((always_inline))

namespace sf {
namespace {

constexpr size_t kBlock = 64;          // bytes of one register
constexpr size_t kGroup = 4 * kBlock;  // the multiplication takes 4 cycles and starts every one

// Large buffers are taken in parts side by side: more pages of DRAM are open, and more fetches
// under way, than one front reaches (64 MiB, copy 7.5 -> 5.1 ms, check 5.3 -> 4.6, where memcpy
// takes 8).
constexpr size_t kParts = 4;
constexpr size_t kPartGroup = 2 * kBlock;
constexpr size_t kPartsStep = kParts * kPartGroup;
constexpr size_t kPartsBytes = size_t{256} << 10;  // from here on they pay for being joined

struct FoldBy {
  uint64_t high, low;
};

// A 32-bit remainder in the upper half of a reflected 64-bit word has the powers x^0 to x^31.
constexpr FoldBy fold_by(uint64_t bits) {
  return {uint64_t{gf2::x_to(bits + 63)} << 32, uint64_t{gf2::x_to(bits - 1)} << 32};
}

constexpr FoldBy kByGroup = fold_by(8 * kGroup), kByPartGroup = fold_by(8 * kPartGroup),
                 kByBlock = fold_by(8 * kBlock), kByLane = fold_by(128);

SF_FOLD_INLINE __m512i constants(FoldBy by) {
  return _mm512_broadcast_i32x4(
      _mm_set_epi64x(static_cast<int64_t>(by.low), static_cast<int64_t>(by.high)));
}

// The first 8 bytes of a lane, its low half in the register, hold the high powers.
SF_FOLD_INLINE __m512i fold(__m512i lanes, __m512i by, __m512i next) {
  const __m512i high = _mm512_clmulepi64_epi128(lanes, by, 0x00);
  const __m512i low = _mm512_clmulepi64_epi128(lanes, by, 0x11);
  return _mm512_ternarylogic_epi64(high, low, next, 0x96);  // exclusive or of the three
}

SF_FOLD_INLINE __m128i fold(__m128i lane, __m128i by, __m128i next) {
  const __m128i high = _mm_clmulepi64_si128(lane, by, 0x00);
  const __m128i low = _mm_clmulepi64_si128(lane, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(high, low), next);
}

// The four lanes as one, and its remainder: that of 16 bytes.
SF_FOLD_INLINE uint32_t reduce(__m512i lanes) {
  const __m128i by = _mm512_castsi512_si128(constants(kByLane));
  __m128i lane = _mm512_castsi512_si128(lanes);
  lane = fold(lane, by, _mm512_extracti32x4_epi32(lanes, 1));
  lane = fold(lane, by, _mm512_extracti32x4_epi32(lanes, 2));
  lane = fold(lane, by, _mm512_extracti32x4_epi32(lanes, 3));
  const uint64_t first = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(lane)));
  return static_cast<uint32_t>(
      _mm_crc32_u64(first, static_cast<uint64_t>(_mm_extract_epi64(lane, 1))));
}

SF_FOLD_INLINE uint32_t short_update(uint32_t crc, const uint8_t* p, size_t n) {
  uint64_t wide = crc;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

// What happens to a block once it is in a register.
struct Nothing {
  Nothing from(size_t) const { return {}; }
  SF_FOLD_INLINE void operator()(size_t, __m512i) const {}
};
struct Store {
  uint8_t* to;
  Store from(size_t at) const { return {to + at}; }
  SF_FOLD_INLINE void operator()(size_t at, __m512i block) const {
    _mm512_storeu_si512(to + at, block);
  }
};
struct StreamStore {
  uint8_t* to;  // a multiple of 64
  StreamStore from(size_t at) const { return {to + at}; }
  SF_FOLD_INLINE void operator()(size_t at, __m512i block) const {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), block);
  }
};

// Checksum of the first n bytes, a multiple of kBlock and at least kGroup.
template <class Sink>
SF_FOLD_INLINE uint32_t fold_blocks(uint32_t crc, const uint8_t* p, size_t n, const Sink& sink) {
  __m512i lanes[4];
  for (size_t k = 0; k < 4; ++k) {
    lanes[k] = _mm512_loadu_si512(p + k * kBlock);
    sink(k * kBlock, lanes[k]);
  }
  // The checksum so far is added to the first bytes that follow it.
  lanes[0] =
      _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  const __m512i by_group = constants(kByGroup), by_block = constants(kByBlock);
  size_t at = kGroup;
  for (; at + kGroup <= n; at += kGroup) {
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
      const __m512i next = _mm512_loadu_si512(p + at + k * kBlock);
      lanes[k] = fold(lanes[k], by_group, next);
      sink(at + k * kBlock, next);
    }
  }
  __m512i joined = lanes[0];
  for (size_t k = 1; k < 4; ++k) joined = fold(joined, by_block, lanes[k]);
  for (; at < n; at += kBlock) {
    const __m512i next = _mm512_loadu_si512(p + at);
    joined = fold(joined, by_block, next);
    sink(at, next);
  }
  return reduce(joined);
}

// The same for n a multiple of kPartsStep. Parts but the first start from nothing; what is before a
// part is joined to it by going over the part's bytes.
template <class Sink>
SF_FOLD_INLINE uint32_t fold_parts(uint32_t crc, const uint8_t* p, size_t n, const Sink& sink) {
  const size_t part = n / kParts;
  __m512i lanes[kParts][2];
  for (size_t i = 0; i < kParts; ++i) {
    for (size_t k = 0; k < 2; ++k) {
      lanes[i][k] = _mm512_loadu_si512(p + i * part + k * kBlock);
      sink(i * part + k * kBlock, lanes[i][k]);
    }
  }
  lanes[0][0] = _mm512_xor_si512(lanes[0][0],
                                 _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  const __m512i by_group = constants(kByPartGroup), by_block = constants(kByBlock);
  for (size_t at = kPartGroup; at < part; at += kPartGroup) {
#pragma GCC unroll 4
    for (size_t i = 0; i < kParts; ++i) {
#pragma GCC unroll 2
      for (size_t k = 0; k < 2; ++k) {
        const __m512i next = _mm512_loadu_si512(p + i * part + at + k * kBlock);
        lanes[i][k] = fold(lanes[i][k], by_group, next);
        sink(i * part + at + k * kBlock, next);
      }
    }
  }
  const uint32_t over_part = gf2::over_bytes(part);
  uint32_t joined = 0;
  for (const auto& lane : lanes) {
    joined = gf2::multiply(joined, over_part) ^ reduce(fold(lane[0], by_block, lane[1]));
  }
  return joined;
}

// Checksum of the first bytes, and how many those were: less than kGroup are left.
template <class Sink>
SF_FOLD_INLINE size_t fold_most(uint32_t& crc, const uint8_t* p, size_t n, const Sink& sink) {
  size_t done = 0;
  if (n >= kPartsBytes) {
    done = n / kPartsStep * kPartsStep;
    crc = fold_parts(crc, p, done, sink);
  }
  if (n - done >= kGroup) {
    const size_t folded = (n - done) / kBlock * kBlock;
    crc = fold_blocks(crc, p + done, folded, sink.from(done));
    done += folded;
  }
  return done;
}

}  // namespace

bool has_fold() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul") &&
         __builtin_cpu_supports("sse4.2");
}

SF_FOLD uint32_t update_fold(uint32_t crc, const uint8_t* p, size_t n) {
  const size_t done = fold_most(crc, p, n, Nothing{});
  return short_update(crc, p + done, n - done);
}

SF_FOLD uint32_t copy_fold(uint32_t crc, uint8_t* to, const uint8_t* from, size_t n, bool streams) {
  if (n == 0) return crc;  // the pointers may be null
  if (streams) {
    const size_t head = std::min(n, -reinterpret_cast<uintptr_t>(to) % kBlock);
    crc = short_update(crc, from, head);
    std::memcpy(to, from, head);
    to += head;
    from += head;
    n -= head;
  }
  const size_t done =
      streams ? fold_most(crc, from, n, StreamStore{to}) : fold_most(crc, from, n, Store{to});
  crc = short_update(crc, from + done, n - done);
  std::memcpy(to + done, from + done, n - done);
  if (streams) _mm_sfence();  // before anyone is told that the bytes are there
  return crc;
}

}  // namespace sf

#else

namespace sf {

bool has_fold() { return false; }
uint32_t update_fold(uint32_t crc, const uint8_t*, size_t) { return crc; }
uint32_t copy_fold(uint32_t crc, uint8_t*, const uint8_t*, size_t, bool) { return crc; }

}  // namespace sf

#endif
