#include <climits>

#include "core/dtype.h"
#include "core/launch.cuh"
#include "core/online_softmax.cuh"
#include "core/reduce.cuh"
#include "core/vector.cuh"
#include "loss/row_stats.h"

namespace sf::cuda {
namespace {

constexpr unsigned kMaxThreads = 512;
constexpr int kBatch = 2;  // chunks in flight per thread: 32 B (bf16) or 64 B (f32)

struct Shared {
  OnlineSoftmax partial[kMaxWarps];
};

// One row per block; a thread takes every blockDim-th chunk of 8 elements. A row whose start is not
// 16-byte aligned gives its first and last few elements to single threads.
// Moves vocab * sizeof(T) bytes in and 8 out per row.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    row_stats_kernel(const T* __restrict__ logits, int vocab, float* __restrict__ lse,
                     int32_t* __restrict__ argmax) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * vocab;
  const int thread = threadIdx.x;
  const int stride = blockDim.x;

  const int past_boundary = static_cast<int>(reinterpret_cast<uintptr_t>(x) % sizeof(uint4));
  const int to_boundary =
      static_cast<int>((sizeof(uint4) - past_boundary) % sizeof(uint4) / sizeof(T));
  const int head = to_boundary < vocab ? to_boundary : vocab;
  const int chunks = (vocab - head) / kChunk;
  const int body_end = head + chunks * kChunk;

  OnlineSoftmax stats = OnlineSoftmax::identity();
  float one[1];
  if (thread < head) {
    one[0] = load_one(x + thread);
    stats.add(one, thread);
  }
  float values[kChunk];
  int chunk = thread;
  for (; chunk < chunks - (kBatch - 1) * stride; chunk += kBatch * stride) {
    Chunk<T> loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      loaded[i] = load_chunk(x + head + (chunk + i * stride) * kChunk);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      unpack(loaded[i], values);
      stats.add(values, head + (chunk + i * stride) * kChunk);
    }
  }
  for (; chunk < chunks; chunk += stride) {
    unpack(load_chunk(x + head + chunk * kChunk), values);
    stats.add(values, head + chunk * kChunk);
  }
  if (thread < vocab - body_end) {
    one[0] = load_one(x + body_end + thread);
    stats.add(one, body_end + thread);
  }

  stats = block_reduce(stats, shared_storage<Shared>().partial);
  if (thread == 0) {
    lse[row] = stats.lse();
    argmax[row] = stats.index();
  }
}

}  // namespace

void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax,
               Stream stream) {
  const DeviceScope device(logits.device);
  const int vocab = static_cast<int>(logits.shape[1]);
  const LaunchShape shape{blocks_for_rows("row_stats", logits.shape[0]),
                          threads_for(vocab / kChunk, kMaxThreads), sizeof(Shared)};
  if (logits.dtype == kBF16) {
    launch(shape, stream, row_stats_kernel<bf16>, logits.as<const bf16>(), vocab, lse.as<float>(),
           argmax.as<int32_t>());
  } else {
    launch(shape, stream, row_stats_kernel<float>, logits.as<const float>(), vocab, lse.as<float>(),
           argmax.as<int32_t>());
  }
}

}  // namespace sf::cuda
