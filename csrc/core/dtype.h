// Element types that cross the border of the library, and bf16 <-> f32.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

// Code that is compiled more than once, with different instruction sets, must never be emitted as a
// shared symbol: the linker would keep any one of the copies. Hence this, not a plain inline.
#define SF_ALWAYS_INLINE inline __attribute__((always_inline))

namespace sf {

enum class DType : uint8_t { kF32, kBF16, kF16, kF64, kI32, kI64, kU8, kBool };
using enum DType;

constexpr size_t dtype_size(DType dtype) {
  switch (dtype) {
    case kF64:
    case kI64:
      return 8;
    case kF32:
    case kI32:
      return 4;
    case kBF16:
    case kF16:
      return 2;
    case kU8:
    case kBool:
      return 1;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case kF32:
      return "f32";
    case kBF16:
      return "bf16";
    case kF16:
      return "f16";
    case kF64:
      return "f64";
    case kI32:
      return "i32";
    case kI64:
      return "i64";
    case kU8:
      return "u8";
    case kBool:
      return "bool";
  }
  return "?";
}

// The upper half of a float32. Host code only; device code uses the compiler's own type.
struct bf16 {
  uint16_t bits;
};

SF_ALWAYS_INLINE float to_f32(float x) { return x; }

SF_ALWAYS_INLINE float to_f32(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// Rounds to nearest, ties to even. A NaN stays a NaN.
SF_ALWAYS_INLINE bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

}  // namespace sf
