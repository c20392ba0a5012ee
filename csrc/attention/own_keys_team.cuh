// How the kernels of own_keys see their operands: teams of lanes, tables of pointers. Internal.
//
// A team of kLanes neighbouring lanes serves one row and one head of keys, with the heads of
// queries that share it; each lane holds one chunk of head_dim, so the last lanes of a team may
// have none. Lanes of teams past the end take part in the warp's collectives and touch no memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/own_keys.h"
#include "core/reduce.cuh"
#include "core/vector.cuh"

namespace sf::cuda {
namespace {

// Tables of pointers travel in the kernel's parameters, which may be 4 KiB together.
template <class T>
struct OwnTable {
  const T* keys[kMaxOwnKeys];
  const T* values[kMaxOwnKeys];
  const int64_t* rows[kMaxOwnKeys];  // nullptr: all in order
  int64_t num_rows[kMaxOwnKeys];
};

struct Sizes {
  int64_t num_rows;
  int heads, kv_heads, head_dim, depth;
  float scale;
};

struct Sum {
  float x;
  __device__ __forceinline__ void merge(const Sum& other) { x += other.x; }
};

struct SumPair {
  float x, y;
  __device__ __forceinline__ void merge(const SumPair& other) {
    x += other.x;
    y += other.y;
  }
};

// The result is right in every lane of the team.
template <int kLanes, class S>
__device__ __forceinline__ S team_reduce(S value) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) value.merge(shuffle_xor(value, bits));
  return value;
}

__device__ __forceinline__ float dot(const float (&a)[kChunk], const float (&b)[kChunk]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

__device__ __forceinline__ void add_scaled(float (&to)[kChunk], float factor,
                                           const float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) to[i] = fmaf(factor, x[i], to[i]);
}

template <class T>
__device__ __forceinline__ void read(const T* tensor, int64_t place, bool active,
                                     float (&x)[kChunk]) {
  if (active) {
    unpack(load_chunk(tensor + place), x);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void write(T* tensor, int64_t place, bool active,
                                      const float (&x)[kChunk]) {
  if (!active) return;
  Chunk<T> chunk;
  pack(x, chunk);
  store_chunk(tensor + place, chunk);
}

// Who this thread is.
template <int kLanes>
struct Team {
  int64_t row;  // may be past the last query
  int kv_head;
  int place;      // first element of this lane's chunk
  bool computes;  // the row is one of the queries'
  bool active;    // ... and this lane has a chunk

  __device__ __forceinline__ explicit Team(const Sizes& sizes) {
    const int64_t index =
        (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / static_cast<unsigned>(kLanes);
    row = index / sizes.kv_heads;
    kv_head = static_cast<int>(index % sizes.kv_heads);
    place = static_cast<int>(threadIdx.x % kLanes) * kChunk;
    computes = row < sizes.num_rows;
    active = computes && place < sizes.head_dim;
  }
  // Of this lane's chunk of query head g of the team's group, in [rows, heads, head_dim].
  __device__ __forceinline__ int64_t query(const Sizes& sizes, int g) const {
    return (row * sizes.heads + head(sizes, g)) * sizes.head_dim + place;
  }
  __device__ __forceinline__ int head(const Sizes& sizes, int g) const {
    return kv_head * (sizes.heads / sizes.kv_heads) + g;
  }
  // Of this lane's chunk of an own row, in [own_rows, kv_heads, head_dim].
  __device__ __forceinline__ int64_t own(const Sizes& sizes, int64_t own_row) const {
    return (own_row * sizes.kv_heads + kv_head) * sizes.head_dim + place;
  }
};

__device__ __forceinline__ int64_t place_of(const int64_t* rows, int64_t row) {
  return rows == nullptr ? row : rows[row];
}

// This row's place among the rows of step j; -1 if it is out of range.
template <class T>
__device__ __forceinline__ int64_t own_row(const OwnTable<T>& own, int j, int64_t row) {
  const int64_t place = place_of(own.rows[j], row);
  return place >= 0 && place < own.num_rows[j] ? place : -1;
}

}  // namespace
}  // namespace sf::cuda
