#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "loss/step_sums.h"

namespace sf::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kColumns = 7;

struct Operands {
  const float* loss;
  const float* accepted;
  const float* top_prob;
  const float* entropy;
  const float* weight;
  const uint8_t* correct;
  const int32_t* step;
  int64_t rows;
};

struct Sums {
  double column[kColumns];

  static __device__ __forceinline__ Sums identity() { return {}; }
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) column[k] += other.column[k];
  }
};

struct Shared {
  Sums partial[kMaxWarps];
};

// Block i sums the rows of step i; a thread takes every blockDim-th row in ascending order. Reads 8
// bytes of every row and 17 more of the rows of its step.
__global__ void __launch_bounds__(kThreads) step_sums_kernel(const Operands args, double* sums) {
  const int step = blockIdx.x;
  Sums total = Sums::identity();
  for (int64_t n = threadIdx.x; n < args.rows; n += blockDim.x) {
    const float weight = args.weight[n];
    if (args.step[n] != step || weight == 0.0f) continue;
    total.merge({{args.loss[n], static_cast<double>(args.correct[n]), args.accepted[n], 1.0,
                  static_cast<double>(weight) * args.loss[n], args.top_prob[n], args.entropy[n]}});
  }
  total = block_reduce(total, shared_storage<Shared>().partial);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sums[int64_t{k} * gridDim.x + step] = total.column[k];
}

}  // namespace

void step_sums(const StepSums& args, Stream stream) {
  const DeviceScope device(args.sums.device);
  const Operands operands{args.loss.as<const float>(),     args.accepted.as<const float>(),
                          args.top_prob.as<const float>(), args.entropy.as<const float>(),
                          args.weight.as<const float>(),   args.correct.as<const uint8_t>(),
                          args.step.as<const int32_t>(),   args.loss.shape[0]};
  launch({static_cast<unsigned>(args.sums.shape[1]), threads_for(operands.rows, kThreads),
          sizeof(Shared)},
         stream, step_sums_kernel, operands, args.sums.as<double>());
}

}  // namespace sf::cuda
