// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 section B.4).
// "123456789" gives 0xE3069283. Every path gives the same checksum; the CPU decides at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace sf {

// `crc` is the checksum of the bytes before these: crc32c(b, m, crc32c(a, n)) = crc32c(a followed
// by b).
uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc = 0);

// memcpy and checksum in one pass: each byte is read once. From 32 MiB on the stores go past the
// caches. The ranges must not overlap.
uint32_t copy_crc32c(void* dst, const void* src, size_t nbytes, uint32_t crc = 0);

// memcpy by the pass above where that is the faster one (AVX-512), its checksum thrown away.
void copy_bytes(void* dst, const void* src, size_t nbytes);

// Checksum of a followed by b, from those of a and of the `nbytes` bytes of b.
uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b);

// The table path whatever the CPU has: what the others are tested against.
uint32_t crc32c_table(const void* data, size_t nbytes, uint32_t crc = 0);

// One implementation. Both functions work on the checksum without its final inversion; `streams`
// asks `copy` for stores that go past the caches.
struct Crc32cPath {
  const char* name;  // "table", "sse42", "vpclmul"
  uint32_t (*update)(uint32_t crc, const uint8_t* data, size_t nbytes);
  uint32_t (*copy)(uint32_t crc, uint8_t* dst, const uint8_t* src, size_t nbytes, bool streams);
};

// Those that this CPU can run, slowest first; the last one is used.
std::span<const Crc32cPath> crc32c_paths();

}  // namespace sf
