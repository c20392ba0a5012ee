#include "core/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>
#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace sf {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0);
    table[i] = c;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kTable = make_table();

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* data, size_t nbytes,
                                                        uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
  uint64_t c = ~crc;
  for (; nbytes >= 8; nbytes -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    c = _mm_crc32_u64(c, word);
  }
  for (; nbytes > 0; --nbytes, ++p) c = _mm_crc32_u8(static_cast<uint32_t>(c), *p);
  return ~static_cast<uint32_t>(c);
}
#endif

}  // namespace

uint32_t crc32c_table(const void* data, size_t nbytes, uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; nbytes > 0; --nbytes, ++p) crc = (crc >> 8) ^ kTable[(crc ^ *p) & 0xff];
  return ~crc;
}

uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc) {
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
  if (has_sse42) return crc32c_sse42(data, nbytes, crc);
#endif
  return crc32c_table(data, nbytes, crc);
}

uint32_t copy_crc32c(void* dst, const void* src, size_t nbytes, uint32_t crc) {
  constexpr size_t kBlock = 16 << 10;  // stays in L1 between the two passes
  auto* to = static_cast<char*>(dst);
  const auto* from = static_cast<const char*>(src);
  for (size_t done = 0; done < nbytes; done += kBlock) {
    const size_t n = std::min(kBlock, nbytes - done);
    crc = crc32c(from + done, n, crc);
    std::memcpy(to + done, from + done, n);
  }
  return crc;
}

}  // namespace sf
