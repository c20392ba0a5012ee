// crc32c of a row by one block: lookups by 4 bits, whose 16 entries lie in 16 different banks of
// shared memory, so that no lane waits for another.
//
// Everything is linear over GF(2) without the checksum's inversions ("raw" below, starting from 0):
// raw(a followed by b) = raw(a) * x^(8 |b|) + raw(b), and zero bytes in front change nothing. A row
// is cut into chunks of 16 bytes from its end; slot t of every round of blockDim chunks belongs to
// thread t, the first slots of the first round to nobody.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/crc32c_gf2.h"
#include "core/reduce.cuh"

namespace sf {

constexpr int kCrcChunk = 16;  // bytes
constexpr int kCrcLevels = 9;  // blockDim is at most 2^8

struct CrcTables {
  uint32_t chunk[2 * kCrcChunk][16];  // raw checksum of a chunk of zeros but for these 4 bits
  uint32_t over[kCrcLevels][8][16];   // [l]: these 4 bits of a checksum, 2^l chunks later
};

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  // Bit m of a chunk stands for x^(127 - m), and a checksum holds the remainder of x^32 times it.
  uint32_t power = gf2::x_to(32);
  for (int m = 8 * kCrcChunk - 1; m >= 0; --m, power = gf2::times_x(power)) {
    for (int v = 0; v < 16; ++v) tables.chunk[m / 4][v] ^= (v >> m % 4 & 1) != 0 ? power : 0;
  }
  for (int level = 0; level < kCrcLevels; ++level) {
    power = gf2::x_to(8ull * kCrcChunk << level);
    for (int m = 31; m >= 0; --m, power = gf2::times_x(power)) {
      for (int v = 0; v < 16; ++v)
        tables.over[level][m / 4][v] ^= (v >> m % 4 & 1) != 0 ? power : 0;
    }
  }
  return tables;
}

__device__ constexpr CrcTables kCrcTables = make_crc_tables();

// All threads; a barrier must follow.
__device__ __forceinline__ void load_crc_tables(CrcTables& tables) {
  constexpr int kWords = sizeof(CrcTables) / 4;
  const auto* from = reinterpret_cast<const uint32_t*>(&kCrcTables);
  auto* to = reinterpret_cast<uint32_t*>(&tables);
  for (int i = threadIdx.x; i < kWords; i += blockDim.x) to[i] = from[i];
}

__device__ __forceinline__ uint32_t crc_over(const CrcTables& tables, int level, uint32_t crc) {
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) result ^= tables.over[level][i][crc >> (4 * i) & 15];
  return result;
}

__device__ __forceinline__ uint32_t crc_of_chunk(const CrcTables& tables, const uint4& chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  uint32_t result = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < 8; ++i) result ^= tables.chunk[8 * w + i][words[w] >> (4 * i) & 15];
  }
  return result;
}

// The row's raw checksum in thread 0, from what each thread found in its slots. One barrier.
__device__ __forceinline__ uint32_t crc_of_block(const CrcTables& tables, uint32_t crc,
                                                 uint32_t (&partial)[kMaxWarps]) {
  const unsigned lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int level = 0; level < 5; ++level) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, crc, 1u << level);
    const bool is_right = (lane >> level & 1) != 0;
    crc = crc_over(tables, level, is_right ? other : crc) ^ (is_right ? crc : other);
  }
  if (lane == 0) partial[threadIdx.x / kWarpSize] = crc;
  __syncthreads();
  uint32_t total = 0;
  if (threadIdx.x == 0) {
    for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) {
      total = crc_over(tables, 5, total) ^ partial[w];
    }
  }
  return total;
}

}  // namespace sf
