// How a thread of loss_rows gets at its elements of a student row and its teacher row.
#pragma once

#include "core/online_softmax.cuh"
#include "core/vector.cuh"
#include "loss/loss_rows_plan.h"

namespace sf::cuda {
namespace {

template <class T>
constexpr int kHeldChunks = 16 / static_cast<int>(sizeof(T)) / 2;
static_assert(held_elements(kBF16) == kHeldChunks<bf16> * kChunk);
static_assert(held_elements(kF32) == kHeldChunks<float> * kChunk);

template <Access kAccess>
constexpr int kWidth = kAccess == Access::kScalar ? 1 : kChunk;

// Rows whose dtype is known only when the kernel runs: for the scalar path, which need not be fast
// and so need not be compiled for every pair of dtypes.
struct AnyRow {
  void* data;
  bool is_bf16;

  __device__ __forceinline__ AnyRow operator+(int64_t elements) const {
    return {static_cast<char*>(data) + elements * (is_bf16 ? sizeof(bf16) : sizeof(float)),
            is_bf16};
  }
};
__device__ __forceinline__ float load_one(AnyRow row) {
  return row.is_bf16 ? sf::load_one(static_cast<const bf16*>(row.data))
                     : sf::load_one(static_cast<const float*>(row.data));
}
__device__ __forceinline__ void store_one(AnyRow row, float x) {
  if (row.is_bf16) {
    sf::store_one(static_cast<bf16*>(row.data), x);
  } else {
    sf::store_one(static_cast<float*>(row.data), x);
  }
}
using sf::load_one;
using sf::store_one;

// The part of a row that one block works on, in steps of kWidth elements.
struct Slice {
  unsigned begin, count;
};

template <class T>
__device__ __forceinline__ void load(const T* address, float (&x)[kChunk]) {
  unpack(load_chunk(address), x);
}
template <class Row>
__device__ __forceinline__ void load(Row address, float (&x)[1]) {
  x[0] = load_one(address);
}
template <class Z>
__device__ __forceinline__ void store(Z* address, const float (&x)[kChunk]) {
  Chunk<Z> chunk;
  pack(x, chunk);
  store_chunk(address, chunk);
}
template <class Row>
__device__ __forceinline__ void store(Row address, const float (&x)[1]) {
  store_one(address, x[0]);
}

template <Access kAccess, class Z>
__device__ __forceinline__ void fill_zero(Z z, const Slice& slice) {
  const float zero[kWidth<kAccess>] = {};
  for (unsigned i = threadIdx.x; i < slice.count; i += blockDim.x) {
    store(z + (slice.begin + i) * kWidth<kAccess>, zero);
  }
}

// Z and T: pointers to the elements, or AnyRow. A thread owns every blockDim-th step, in ascending
// order. Without kTeacher the second argument of f is all zeros.
template <Access kAccess, bool kTeacher, class Z, class T>
struct Rows {
  static constexpr int kSize = kWidth<kAccess>;
  Z z;
  T t;
  unsigned count;  // steps

  __device__ __forceinline__ void fetch() {}

  // f(x, y, index of x[0] from z) for every step. The rows stay as they are.
  template <class F>
  __device__ __forceinline__ void visit(F f) {
    rewrite(f, false);
  }

  // The same; what f leaves in x becomes the student row.
  template <class F>
  __device__ __forceinline__ void rewrite(F f, bool writes) {
    float x[kSize], y[kSize] = {};
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
      const unsigned at = i * kSize;
      load(z + at, x);
      if constexpr (kTeacher) load(t + at, y);
      f(x, y, at);
      if (writes) store(z + at, x);
    }
  }
};

template <bool kTeacher, class Z, class T>
struct Rows<Access::kHeld, kTeacher, Z*, const T*> {
  static constexpr int kCount = kHeldChunks<Z>;
  Z* z;
  const T* t;
  unsigned count;
  Chunk<Z> student[kCount];
  Chunk<T> teacher[kCount];

  // All loads are issued before the first is used.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const unsigned i = threadIdx.x + k * blockDim.x;
      if (i < count) {
        student[k] = load_chunk(z + i * kChunk);
        if constexpr (kTeacher) teacher[k] = load_chunk(t + i * kChunk);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void visit(F f) {
    rewrite(f, false);
  }

  template <class F>
  __device__ __forceinline__ void rewrite(F f, bool writes) {
    float x[kChunk], y[kChunk] = {};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const unsigned i = threadIdx.x + k * blockDim.x;
      if (i < count) {
        const unsigned at = i * kChunk;
        unpack(student[k], x);
        if constexpr (kTeacher) unpack(teacher[k], y);
        f(x, y, at);
        if (writes) store(z + at, x);
      }
    }
  }
};

}  // namespace
}  // namespace sf::cuda
