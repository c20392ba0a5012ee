// CRC-32C by carry-less multiplication, 64 bytes per instruction pair (AVX-512 VPCLMULQDQ).
// Internal: the CPU must have what has_fold() asks for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sf {

bool has_fold();
uint32_t update_fold(uint32_t crc, const uint8_t* p, size_t n);
uint32_t copy_fold(uint32_t crc, uint8_t* to, const uint8_t* from, size_t n, bool streams);

}  // namespace sf
