// 16 neighbouring values of a row and their codes: loaded, converted, stored. A chunk may start
// before its row, unless kVector says that it does not and lies on 16-byte boundaries.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/vector.cuh"
#include "wire/fp8_convert.h"

namespace sf::cuda {

using fp8::f16;

constexpr int kChunkSize = 16;

// Where the chunks of a row lie: the first one may start before the row.
struct Chunks {
  int width, count, rounds, unused;  // unused slots, all in the first round

  __device__ __forceinline__ explicit Chunks(int width_)
      : width(width_),
        count((width_ + kChunkSize - 1) / kChunkSize),
        rounds((count + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x)),
        unused(rounds * static_cast<int>(blockDim.x) - count) {}
  // Negative: this slot holds no chunk.
  __device__ __forceinline__ int index(int round) const {
    return round * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x) - unused;
  }
  __device__ __forceinline__ int first(int chunk) const {
    return width - (count - chunk) * kChunkSize;
  }
};

__device__ __forceinline__ float half_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#else
  return fp8::widen(f16{static_cast<uint16_t>(bits)});
#endif
}

__device__ __forceinline__ uint32_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  f16 half;
  fp8::narrow(x, half);
  return half.bits;
#endif
}

// Two codes. The hardware's instruction and the bits give the same for every finite input.
__device__ __forceinline__ uint32_t encode_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return fp8::encode(low) | uint32_t{fp8::encode(high)} << 8;
#endif
}

__device__ __forceinline__ void widen_word(uint32_t word, float (&v)[kChunkSize], int at, float) {
  v[at] = __uint_as_float(word);
}
__device__ __forceinline__ void widen_word(uint32_t word, float (&v)[kChunkSize], int at, bf16) {
  v[at] = __uint_as_float(word << 16);
  v[at + 1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void widen_word(uint32_t word, float (&v)[kChunkSize], int at, f16) {
  v[at] = half_to_float(word & 0xffff);
  v[at + 1] = half_to_float(word >> 16);
}

__device__ __forceinline__ uint32_t narrow_word(const float (&v)[kChunkSize], int at, float) {
  return __float_as_uint(v[at]);
}
__device__ __forceinline__ uint32_t narrow_word(const float (&v)[kChunkSize], int at, bf16) {
  return pack_bf16(v[at], v[at + 1]);
}
__device__ __forceinline__ uint32_t narrow_word(const float (&v)[kChunkSize], int at, f16) {
  return float_to_half(v[at]) | float_to_half(v[at + 1]) << 16;
}

__device__ __forceinline__ float one_value(float x) { return x; }
__device__ __forceinline__ float one_value(bf16 x) {
  return __uint_as_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ float one_value(f16 x) { return half_to_float(x.bits); }

// 16 values from x[first] on; 0 where that lies before the row. kVector: it does not, and x + first
// is 16-byte aligned.
template <bool kVector, class T>
__device__ __forceinline__ void load_values(const T* x, int first, float (&v)[kChunkSize]) {
  constexpr int kPerWord = 4 / sizeof(T);
  if constexpr (kVector) {
    const auto* from = reinterpret_cast<const uint4*>(x + first);
#pragma unroll
    for (int i = 0; i < kChunkSize / (4 * kPerWord); ++i) {
      const uint4 words = from[i];
      widen_word(words.x, v, (4 * i) * kPerWord, T{});
      widen_word(words.y, v, (4 * i + 1) * kPerWord, T{});
      widen_word(words.z, v, (4 * i + 2) * kPerWord, T{});
      widen_word(words.w, v, (4 * i + 3) * kPerWord, T{});
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkSize; ++i) v[i] = first + i < 0 ? 0.0f : one_value(x[first + i]);
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store_values(T* y, int first, const float (&v)[kChunkSize]) {
  constexpr int kPerWord = 4 / sizeof(T);
  if constexpr (kVector) {
    auto* to = reinterpret_cast<uint4*>(y + first);
#pragma unroll
    for (int i = 0; i < kChunkSize / (4 * kPerWord); ++i) {
      to[i] = uint4{
          narrow_word(v, (4 * i) * kPerWord, T{}), narrow_word(v, (4 * i + 1) * kPerWord, T{}),
          narrow_word(v, (4 * i + 2) * kPerWord, T{}), narrow_word(v, (4 * i + 3) * kPerWord, T{})};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunkSize; ++i) {
      if (first + i >= 0) fp8::narrow(v[i], y[first + i]);
    }
  }
}

__device__ __forceinline__ uint32_t encode_word(const float (&v)[kChunkSize], int at, float inv) {
  return encode_pair(v[at] * inv, v[at + 1] * inv) | encode_pair(v[at + 2] * inv, v[at + 3] * inv)
                                                         << 16;
}

__device__ __forceinline__ uint32_t byte_of(const uint4& words, int i) {
  const uint32_t word = i < 8 ? (i < 4 ? words.x : words.y) : (i < 12 ? words.z : words.w);
  return word >> (8 * (i % 4)) & 0xff;
}

// The bytes before the row become 0 in `codes` as well, so that they do not show in the checksum.
template <bool kVector>
__device__ __forceinline__ void store_codes(uint8_t* payload, int first, uint4& codes) {
  if constexpr (kVector) {
    *reinterpret_cast<uint4*>(payload + first) = codes;
  } else {
    uint32_t kept[4] = {};
#pragma unroll
    for (int i = 0; i < kChunkSize; ++i) {
      if (first + i < 0) continue;
      const uint32_t code = byte_of(codes, i);
      payload[first + i] = static_cast<uint8_t>(code);
      kept[i / 4] |= code << (8 * (i % 4));
    }
    codes = uint4{kept[0], kept[1], kept[2], kept[3]};
  }
}

template <bool kVector>
__device__ __forceinline__ uint4 load_codes(const uint8_t* payload, int first) {
  if constexpr (kVector) {
    return *reinterpret_cast<const uint4*>(payload + first);
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kChunkSize; ++i) {
      if (first + i >= 0) words[i / 4] |= uint32_t{payload[first + i]} << (8 * (i % 4));
    }
    return uint4{words[0], words[1], words[2], words[3]};
  }
}

}  // namespace sf::cuda
