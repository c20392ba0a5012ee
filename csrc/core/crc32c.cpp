#include "core/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "core/crc32c_fold.h"
#include "core/crc32c_gf2.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace sf {
namespace {

// Measured: from here on stores past the caches win. Below, the copy is about to be read again.
constexpr size_t kStreamBytes = size_t{32} << 20;

using Table = std::array<std::array<uint32_t, 256>, 8>;

// table[k][b]: what byte b does to the checksum when k zero bytes follow it.
constexpr Table make_table() {
  Table table{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = gf2::times_x(crc);
    table[0][b] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t b = 0; b < 256; ++b) {
      const uint32_t before = table[k - 1][b];
      table[k][b] = (before >> 8) ^ table[0][before & 0xff];
    }
  }
  return table;
}

constexpr Table kTable = make_table();

// All functions below work on the checksum without its final inversion.
uint32_t update_table(uint32_t crc, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    word ^= crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kTable[7 - k][(word >> (8 * k)) & 0xff];
  }
  for (; n > 0; ++p, --n) crc = (crc >> 8) ^ kTable[0][(crc ^ *p) & 0xff];
  return crc;
}

#if defined(__x86_64__)

// The instruction takes 3 cycles but starts every cycle, so three lanes run side by side, and their
// checksums are joined by shifting the earlier ones over the bytes of a lane.
constexpr size_t kLane = 1024;

using Shift = std::array<std::array<uint32_t, 256>, 4>;

// shift[k][b]: the checksum 'b << 8k' after kLane zero bytes.
constexpr Shift make_shift() {
  constexpr uint32_t kOver = gf2::over_bytes(kLane);
  Shift shift{};
  for (size_t k = 0; k < 4; ++k) {
    for (uint32_t b = 0; b < 256; ++b) shift[k][b] = gf2::multiply(b << (8 * k), kOver);
  }
  return shift;
}

const Shift& shift_table() {
  static const Shift shift = make_shift();
  return shift;
}

uint32_t over_lane(const Shift& shift, uint32_t crc) {
  return shift[0][crc & 0xff] ^ shift[1][crc >> 8 & 0xff] ^ shift[2][crc >> 16 & 0xff] ^
         shift[3][crc >> 24];
}

uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;
}

#define SF_SSE42 __attribute__((target("sse4.2")))

enum class Stores { kNone, kCached, kStreamed };

template <Stores kStores>
SF_SSE42 inline uint64_t step(uint64_t crc, uint8_t* to, const uint8_t* from) {
  const uint64_t word = load_word(from);
  if constexpr (kStores == Stores::kCached) std::memcpy(to, &word, 8);
  if constexpr (kStores == Stores::kStreamed) {
    _mm_stream_si64(reinterpret_cast<long long*>(to), static_cast<long long>(word));
  }
  return _mm_crc32_u64(crc, word);
}

template <Stores kStores>
SF_SSE42 uint32_t run_sse42(uint32_t crc, uint8_t* to, const uint8_t* from, size_t n) {
  const Shift& shift = shift_table();
  size_t at = 0;
  for (; at + 3 * kLane <= n; at += 3 * kLane) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = at; i < at + kLane; i += 8) {
      a = step<kStores>(a, to + i, from + i);
      b = step<kStores>(b, to + kLane + i, from + kLane + i);
      c = step<kStores>(c, to + 2 * kLane + i, from + 2 * kLane + i);
    }
    crc = over_lane(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    crc = over_lane(shift, crc) ^ static_cast<uint32_t>(c);
  }
  uint64_t wide = crc;
  for (; at + 8 <= n; at += 8) wide = step<kStores>(wide, to + at, from + at);
  crc = static_cast<uint32_t>(wide);
  for (; at < n; ++at) {
    if constexpr (kStores != Stores::kNone) to[at] = from[at];
    crc = _mm_crc32_u8(crc, from[at]);
  }
  if constexpr (kStores == Stores::kStreamed) _mm_sfence();
  return crc;
}

uint32_t update_sse42(uint32_t crc, const uint8_t* p, size_t n) {
  return run_sse42<Stores::kNone>(crc, nullptr, p, n);
}

uint32_t copy_sse42(uint32_t crc, uint8_t* to, const uint8_t* from, size_t n, bool streams) {
  if (!streams) return run_sse42<Stores::kCached>(crc, to, from, n);
  // Lines are written whole, so they must start where the lanes do.
  const size_t head = std::min(n, -reinterpret_cast<uintptr_t>(to) % 64);
  crc = run_sse42<Stores::kCached>(crc, to, from, head);
  return run_sse42<Stores::kStreamed>(crc, to + head, from + head, n - head);
}

bool has_sse42() { return __builtin_cpu_supports("sse4.2"); }

#else

bool has_sse42() { return false; }
uint32_t update_sse42(uint32_t crc, const uint8_t*, size_t) { return crc; }
uint32_t copy_sse42(uint32_t crc, uint8_t*, const uint8_t*, size_t, bool) { return crc; }

#endif

// A piece is read twice while it lies in L1.
uint32_t copy_table(uint32_t crc, uint8_t* to, const uint8_t* from, size_t n, bool) {
  constexpr size_t kPiece = 12 * 1024;
  for (size_t at = 0; at < n; at += kPiece) {
    const size_t size = std::min(kPiece, n - at);
    crc = update_table(crc, from + at, size);
    std::memcpy(to + at, from + at, size);
  }
  return crc;
}

std::vector<Crc32cPath> find_paths() {
  std::vector<Crc32cPath> paths{{"table", &update_table, &copy_table}};
  if (has_sse42()) paths.push_back({"sse42", &update_sse42, &copy_sse42});
  if (has_fold()) paths.push_back({"vpclmul", &update_fold, &copy_fold});
  return paths;
}

const Crc32cPath& best_path() {
  static const Crc32cPath best = crc32c_paths().back();
  return best;
}

}  // namespace

std::span<const Crc32cPath> crc32c_paths() {
  static const std::vector<Crc32cPath> paths = find_paths();
  return paths;
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc) {
  return ~best_path().update(~crc, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t crc32c_table(const void* data, size_t nbytes, uint32_t crc) {
  return ~update_table(~crc, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t copy_crc32c(void* dst, const void* src, size_t nbytes, uint32_t crc) {
  return ~best_path().copy(~crc, static_cast<uint8_t*>(dst), static_cast<const uint8_t*>(src),
                           nbytes, nbytes >= kStreamBytes);
}

void copy_bytes(void* dst, const void* src, size_t nbytes) {
  if (has_fold()) {
    copy_crc32c(dst, src, nbytes);
  } else if (nbytes != 0) {  // else the pointers may be null
    std::memcpy(dst, src, nbytes);
  }
}

// The inversions before and after cancel: those of a's end and of b's start are the same bits.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b) {
  return gf2::multiply(crc_a, gf2::over_bytes(nbytes_b)) ^ crc_b;
}

}  // namespace sf
