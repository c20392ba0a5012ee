// Eight neighbouring elements of a row, moved as 16-byte vectors and computed in f32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace sf {

constexpr int kChunk = 8;  // bf16: one 16-byte vector; f32: two

template <class T>
struct Chunk {
  uint4 words[kChunk * sizeof(T) / sizeof(uint4)];
};

// Two f32, rounded to nearest even, as bf16 in the low and the high half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return to_bf16(low).bits | uint32_t{to_bf16(high).bits} << 16;
#endif
}

// address must be 16-byte aligned
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* address) {
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(uint4)); ++i) {
    chunk.words[i] = reinterpret_cast<const uint4*>(address)[i];
  }
  return chunk;
}

template <class T>
__device__ __forceinline__ void store_chunk(T* address, const Chunk<T>& chunk) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(uint4)); ++i) {
    reinterpret_cast<uint4*>(address)[i] = chunk.words[i];
  }
}

__device__ __forceinline__ void unpack(const Chunk<bf16>& chunk, float (&x)[kChunk]) {
  const uint32_t words[4] = {chunk.words[0].x, chunk.words[0].y, chunk.words[0].z,
                             chunk.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const Chunk<float>& chunk, float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = __uint_as_float(chunk.words[i].x);
    x[4 * i + 1] = __uint_as_float(chunk.words[i].y);
    x[4 * i + 2] = __uint_as_float(chunk.words[i].z);
    x[4 * i + 3] = __uint_as_float(chunk.words[i].w);
  }
}

__device__ __forceinline__ void pack(const float (&x)[kChunk], Chunk<bf16>& chunk) {
  chunk.words[0] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                    pack_bf16(x[6], x[7])};
}

__device__ __forceinline__ void pack(const float (&x)[kChunk], Chunk<float>& chunk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    chunk.words[i] = {__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]),
                      __float_as_uint(x[4 * i + 2]), __float_as_uint(x[4 * i + 3])};
  }
}

// Single elements, for rows that no vector fits.
__device__ __forceinline__ float load_one(const float* address) { return *address; }
__device__ __forceinline__ float load_one(const bf16* address) {
  return __uint_as_float(uint32_t{address->bits} << 16);
}
__device__ __forceinline__ void store_one(float* address, float x) { *address = x; }
__device__ __forceinline__ void store_one(bf16* address, float x) {
  address->bits = static_cast<uint16_t>(pack_bf16(x, 0.0f));
}

inline bool vector_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

}  // namespace sf
