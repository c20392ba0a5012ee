// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, RFC 3720 section B.4).
// "123456789" gives 0xE3069283. With the SSE4.2 instruction where the CPU has it, else with tables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sf {

// `crc` is the checksum of the bytes before these: crc32c(b, m, crc32c(a, n)) = crc32c(a followed
// by b).
uint32_t crc32c(const void* data, size_t nbytes, uint32_t crc = 0);

// memcpy and checksum in one pass over memory. The ranges must not overlap.
uint32_t copy_crc32c(void* dst, const void* src, size_t nbytes, uint32_t crc = 0);

// The table path whatever the CPU has: what the other one is tested against.
uint32_t crc32c_table(const void* data, size_t nbytes, uint32_t crc = 0);

}  // namespace sf
