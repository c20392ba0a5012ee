// Reductions and scans over a warp and a block. Their order is fixed, so results are deterministic.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace sf {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// A lane's struct from another lane, word by word.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_bits) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kFullWarp, words[i], lane_bits);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

template <class T>
__device__ __forceinline__ T shuffle_up(const T& value, unsigned delta) {
  constexpr int kWords = sizeof(T) / 4;
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_up_sync(kFullWarp, words[i], delta);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// T has merge(const T&) and T::identity(). The result is right in every lane.
template <class T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) value.merge(shuffle_xor(value, bits));
  return value;
}

// The same with merge(into, from) in place of T::merge.
template <class T, class Merge>
__device__ __forceinline__ T warp_reduce(T value, const Merge& merge) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) merge(value, shuffle_xor(value, bits));
  return value;
}

// Every thread of the block gets the result. One barrier: `partial` must not have been read since
// the last one. Every warp reduces the same partial sums in the same order, so all threads agree.
template <class T>
__device__ __forceinline__ T block_reduce(T value, T (&partial)[kMaxWarps]) {
  const int lane = threadIdx.x % kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  value = warp_reduce(value);
  if (lane == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_reduce(lane < num_warps ? partial[lane] : T::identity());
}

template <class T>
struct ScanResult {
  T before;  // merge of the threads below this one
  T total;   // merge of all threads
};

// Exclusive scan over the block's threads. Two barriers, so that it can be called in a loop.
template <class T>
__device__ __forceinline__ ScanResult<T> block_scan(const T& value, T (&partial)[kMaxWarps]) {
  const unsigned lane = threadIdx.x % kWarpSize;
  const unsigned warp = threadIdx.x / kWarpSize;
  const unsigned num_warps = blockDim.x / kWarpSize;
  T inclusive = value;
#pragma unroll
  for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
    const T below = shuffle_up(inclusive, delta);
    if (lane >= delta) inclusive.merge(below);
  }
  if (lane == kWarpSize - 1) partial[warp] = inclusive;
  __syncthreads();
  ScanResult<T> result{T::identity(), T::identity()};
  for (unsigned w = 0; w < num_warps; ++w) {
    if (w < warp) result.before.merge(partial[w]);
    result.total.merge(partial[w]);
  }
  __syncthreads();
  const T below = shuffle_up(inclusive, 1);
  if (lane > 0) result.before.merge(below);
  return result;
}

}  // namespace sf
