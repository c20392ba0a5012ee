#include "core/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace sf {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;

using Table = std::array<std::array<uint32_t, 256>, 8>;

// table[k][b]: what byte b does to the checksum when k zero bytes follow it.
constexpr Table make_table() {
  Table table{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
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

// shift[k][b]: the checksum 'b << 8k' after kLane zero bytes. Shifting is linear over GF(2).
constexpr Shift make_shift() {
  std::array<uint32_t, 32> of_bit{};
  for (size_t bit = 0; bit < 32; ++bit) {
    uint32_t crc = 1u << bit;
    for (size_t n = 0; n < kLane; ++n) crc = (crc >> 8) ^ kTable[0][crc & 0xff];
    of_bit[bit] = crc;
  }
  Shift shift{};
  for (size_t k = 0; k < 4; ++k) {
    for (size_t b = 0; b < 256; ++b) {
      for (size_t bit = 0; bit < 8; ++bit) {
        if ((b >> bit & 1) != 0) shift[k][b] ^= of_bit[8 * k + bit];
      }
    }
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

__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t crc, const uint8_t* p, size_t n) {
  const Shift& shift = shift_table();
  for (; n >= 3 * kLane; p += 3 * kLane, n -= 3 * kLane) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      a = _mm_crc32_u64(a, load_word(p + i));
      b = _mm_crc32_u64(b, load_word(p + kLane + i));
      c = _mm_crc32_u64(c, load_word(p + 2 * kLane + i));
    }
    crc = over_lane(shift, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    crc = over_lane(shift, crc) ^ static_cast<uint32_t>(c);
  }
  uint64_t wide = crc;
  for (; n >= 8; p += 8, n -= 8) wide = _mm_crc32_u64(wide, load_word(p));
  crc = static_cast<uint32_t>(wide);
  for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

using Update = uint32_t (*)(uint32_t, const uint8_t*, size_t);
Update update() {
  static const Update best = __builtin_cpu_supports("sse4.2") ? &update_sse42 : &update_table;
  return best;
}

#else

using Update = uint32_t (*)(uint32_t, const uint8_t*, size_t);
Update update() { return &update_table; }

#endif

}  // namespace

uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc) {
  return ~update()(~crc, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t crc32c_table(const void* data, size_t nbytes, uint32_t crc) {
  return ~update_table(~crc, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t copy_crc32c(void* dst, const void* src, size_t nbytes, uint32_t crc) {
  // A piece that is read twice while it lies in L1 or L2.
  constexpr size_t kPiece = 16 * 1024;
  auto* to = static_cast<uint8_t*>(dst);
  auto* from = static_cast<const uint8_t*>(src);
  const Update step = update();
  crc = ~crc;
  for (size_t at = 0; at < nbytes; at += kPiece) {
    const size_t n = std::min(kPiece, nbytes - at);
    crc = step(crc, from + at, n);
    std::memcpy(to + at, from + at, n);
  }
  return ~crc;
}

}  // namespace sf
