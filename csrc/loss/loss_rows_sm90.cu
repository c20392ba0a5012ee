#include "core/cluster.cuh"
#include "core/launch.cuh"
#include "loss/loss_rows.cuh"
#include "loss/loss_rows_launch.h"
#include "loss/loss_rows_plan.h"

namespace sf::cuda {
namespace {

constexpr int kSlots = kMaxCluster * kMaxWarps;

#if SF_CLUSTERS

// Partial results are pushed: lane c of a warp writes the warp's to block c. So after the last
// barrier every block reads its own shared memory only, and none has to wait for another before it
// ends.
struct ClusterTeam {
  static constexpr int kSlots = cuda::kSlots;
  bool met = false;  // a constant once inlined

  __device__ __forceinline__ int64_t row() const { return blockIdx.x / size(); }
  __device__ __forceinline__ unsigned rank() const { return cluster_rank(); }
  __device__ __forceinline__ unsigned size() const { return cluster_size(); }
  __device__ __forceinline__ unsigned slots() const { return size() * (blockDim.x / kWarpSize); }
  // "I have started", which peers wait for before they write here; the loads run meanwhile.
  __device__ __forceinline__ void begin() const { cluster_arrive(); }
  template <class T>
  __device__ __forceinline__ void put(const T& value, T* partial) {
    if (!met) cluster_wait();
    met = true;
    const unsigned lane = threadIdx.x % kWarpSize;
    T* slot = partial + rank() * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    if (lane < size()) *peer_shared(slot, lane) = value;
  }
  __device__ __forceinline__ void sync() const {
    cluster_arrive();
    cluster_wait();
  }
};

#endif  // SF_CLUSTERS

// One row per cluster: each block holds a contiguous part of both rows in registers, so that rows
// too long for one block are still read from memory once. Bytes: see loss_row. Between blocks move
// 24 + 20 bytes per warp and peer and row (without teacher_lse, 12 more), under 100 KB at 8 blocks
// of 32 warps, through distributed shared memory.
template <Group kGroup, class T>
__global__ void __launch_bounds__(kHeldThreads, 1)
    loss_rows_cluster_kernel([[maybe_unused]] const Operands<T*, const T*> args) {
#if SF_CLUSTERS
  loss_row<kGroup, Access::kHeld>(args, ClusterTeam{});
#endif
}

template <class T>
void run(const LossRows& args, const LossSpec& spec, unsigned cluster, Stream stream) {
  const auto operands = operands_of(args, spec, args.logits.as<T>(), args.teacher.as<const T>());
  const int64_t chunks = operands.vocab / kChunk;
  const LaunchShape shape{blocks_for_rows("loss_rows", args.logits.shape[0] * cluster),
                          held_threads((chunks + cluster - 1) / cluster, args.logits.dtype),
                          sizeof(Shared<kSlots>), cluster};
  for_group(spec.kind, [&]<Group kGroup>() {
    launch(shape, stream, loss_rows_cluster_kernel<kGroup, T>, operands);
  });
}

}  // namespace

void loss_rows_cluster(const LossRows& args, const LossSpec& spec, unsigned cluster,
                       Stream stream) {
  if (args.logits.dtype == kBF16) return run<bf16>(args, spec, cluster, stream);
  run<float>(args, spec, cluster, stream);
}

}  // namespace sf::cuda
