// Arithmetic modulo the CRC-32C polynomial, at compile time or run time, on host or device.
// Internal.
//
// A checksum is a polynomial over GF(2) of degree below 32, stored reflected: bit 31 is the
// coefficient of x^0, bit 0 that of x^31. To append n zero bytes to a message multiplies the
// checksum (without its inversions) by x^(8n).
#pragma once

#include <cstdint>

namespace sf::gf2 {

inline constexpr uint32_t kPolynomial = 0x82F63B78;
inline constexpr uint32_t kOne = 0x80000000;

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ ((a & 1) != 0 ? kPolynomial : 0); }

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = times_x(b);
  }
  return product;
}

constexpr uint32_t power(uint32_t base, uint64_t n) {
  uint32_t result = kOne;
  for (; n != 0; n >>= 1) {
    if ((n & 1) != 0) result = multiply(result, base);
    base = multiply(base, base);
  }
  return result;
}

constexpr uint32_t x_to(uint64_t n) { return power(times_x(kOne), n); }

// What to multiply a checksum by to append `nbytes` zero bytes.
constexpr uint32_t over_bytes(uint64_t nbytes) { return power(x_to(8), nbytes); }

static_assert(x_to(32) == kPolynomial && multiply(x_to(5), x_to(70)) == x_to(75));

}  // namespace sf::gf2
