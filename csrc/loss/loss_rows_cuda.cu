#include <type_traits>

#include "core/launch.cuh"
#include "loss/loss_rows.cuh"
#include "loss/loss_rows_launch.h"
#include "loss/loss_rows_plan.h"

namespace sf::cuda {
namespace {

constexpr unsigned kStreamedThreads = 512;

struct BlockTeam {
  static constexpr int kSlots = kMaxWarps;

  __device__ __forceinline__ int64_t row() const { return blockIdx.x; }
  __device__ __forceinline__ unsigned rank() const { return 0; }
  __device__ __forceinline__ unsigned size() const { return 1; }
  __device__ __forceinline__ unsigned slots() const { return blockDim.x / kWarpSize; }
  __device__ __forceinline__ void begin() const {}
  template <class T>
  __device__ __forceinline__ void put(const T& value, T* partial) const {
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// One row per block. What bounds it: memory, see loss_row. A held row of 32768 bf16 elements takes
// the whole register file of an SM, so loading one row and computing on another overlap only
// between SMs; with shorter rows several blocks share an SM.
template <Group kGroup, Access kAccess, class Z, class T>
__global__ void __launch_bounds__(kAccess == Access::kHeld ? kHeldThreads : kStreamedThreads,
                                  kAccess == Access::kHeld ? 1 : 2)
    loss_rows_kernel(const Operands<Z, T> args) {
  loss_row<kGroup, kAccess>(args, BlockTeam{});
}

DType teacher_dtype(const LossRows& args) {
  return args.teacher.rank > 0 ? args.teacher.dtype : args.logits.dtype;
}

template <Group kGroup, Access kAccess, class Z, class T>
void launch_rows(const Operands<Z, T>& operands, unsigned threads, Stream stream) {
  launch({blocks_for_rows("loss_rows", operands.rows), threads, sizeof(Shared<BlockTeam::kSlots>)},
         stream, loss_rows_kernel<kGroup, kAccess, Z, T>, operands);
}

void run_scalar(const LossRows& args, const LossSpec& spec, Stream stream) {
  const auto operands =
      operands_of(args, spec, AnyRow{args.logits.data, args.logits.dtype == kBF16},
                  AnyRow{args.teacher.data, args.teacher.dtype == kBF16});
  for_group(spec.kind, [&]<Group kGroup>() {
    launch_rows<kGroup, Access::kScalar>(operands, threads_for(operands.vocab, kStreamedThreads),
                                         stream);
  });
}

template <class Z, class T>
void run(const LossRows& args, const LossSpec& spec, Access access, Stream stream) {
  const auto operands = operands_of(args, spec, args.logits.as<Z>(), args.teacher.as<const T>());
  const int64_t chunks = operands.vocab / kChunk;
  for_group(spec.kind, [&]<Group kGroup>() {
    if constexpr (std::is_same_v<Z, T>) {
      if (access == Access::kHeld) {
        const unsigned threads = held_threads(chunks, args.logits.dtype);
        return launch_rows<kGroup, Access::kHeld>(operands, threads, stream);
      }
    }
    if constexpr (has_teacher(kGroup) || std::is_same_v<Z, T>) {  // without a teacher T is Z
      const unsigned threads = threads_for(chunks, kStreamedThreads);
      launch_rows<kGroup, Access::kStreamed>(operands, threads, stream);
    }
  });
}

RowTraits traits_of(const LossRows& args) {
  const bool teacher_aligned = args.teacher.rank == 0 || (args.teacher.shape[1] % kChunk == 0 &&
                                                          vector_aligned(args.teacher.data));
  return {
      capability_major(args.logits.device), args.logits.shape[1], args.logits.dtype,
      teacher_dtype(args),
      args.logits.shape[1] % kChunk == 0 && vector_aligned(args.logits.data) && teacher_aligned};
}

}  // namespace

void loss_rows_planned(const LossRows& args, const LossSpec& spec, const RowPlan& plan,
                       Stream stream) {
  const DeviceScope device(args.logits.device);
  if (plan.access == Access::kScalar) return run_scalar(args, spec, stream);
  if (plan.cluster > 1) return loss_rows_cluster(args, spec, plan.cluster, stream);
  const bool student_bf16 = args.logits.dtype == kBF16;
  const bool teacher_bf16 = teacher_dtype(args) == kBF16;
  if (student_bf16 && teacher_bf16) return run<bf16, bf16>(args, spec, plan.access, stream);
  if (student_bf16) return run<bf16, float>(args, spec, plan.access, stream);
  if (teacher_bf16) return run<float, bf16>(args, spec, plan.access, stream);
  run<float, float>(args, spec, plan.access, stream);
}

void loss_rows(const LossRows& args, const LossSpec& spec, Stream stream) {
  loss_rows_planned(args, spec, plan_rows(traits_of(args)), stream);
}

}  // namespace sf::cuda
