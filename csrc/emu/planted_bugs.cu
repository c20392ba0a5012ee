// Kernels that are wrong on purpose: the tests prove that the emulator catches each kind of
// mistake.
#include <string>

#include "core/cluster.cuh"
#include "core/launch.cuh"
#include "core/reduce.cuh"
#include "emu/planted_bugs.h"

namespace sf::emu {
namespace {

constexpr int kThreads = 64;

struct Shared {
  float x[kThreads];
};

// Each thread reads what a thread of the other warp wrote.
template <bool kBarrier>
__global__ void neighbour_kernel(float* out) {
  Shared& shared = shared_storage<Shared>();
  shared.x[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = shared.x[(threadIdx.x + 40) % kThreads];
}

__global__ void shared_overrun_kernel(float* out) {
  float* x = shared_storage<Shared>().x;
  x[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 0.0f;
}

__global__ void global_overrun_kernel(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void uninitialised_kernel(float* out) {
  out[threadIdx.x] = shared_storage<Shared>().x[threadIdx.x];
}

__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0.0f;
}

__global__ void early_return_kernel(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 0.0f;
}

__global__ void split_warp_kernel(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
  } else {
    out[threadIdx.x] = static_cast<float>(__ballot_sync(kFullWarp, true));
  }
}

__global__ void partial_mask_kernel(float* out) {
  out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0);
}

__global__ void too_much_shared_kernel(float* out) {
  out[threadIdx.x] = shared_storage<Shared[2]>()[1].x[threadIdx.x];
}

// Right: lanes order their shared memory by __syncwarp, votes and integer atomics are exact.
__global__ void warp_sync_kernel(float* out) {
  Shared& shared = shared_storage<Shared>();
  const int lane = threadIdx.x % kWarpSize;
  shared.x[threadIdx.x] = static_cast<float>(lane);
  __syncwarp(kFullWarp);
  const float across = shared.x[threadIdx.x ^ 31];
  const unsigned odd = __ballot_sync(kFullWarp, lane % 2 == 1);
  const bool any = __any_sync(kFullWarp, lane == 31);
  out[threadIdx.x] = odd == 0xaaaaaaaau && any ? across : -1.0f;
}

__global__ void atomic_kernel(float* out) {
  unsigned* count = reinterpret_cast<unsigned*>(out);
  atomicAdd(count, 1u);
}

// Each thread reads what its peer in the cluster's other block wrote. kLeaves: the block that reads
// last finds the other gone.
enum class Cluster { kRight, kNoBarrier, kNotStarted, kLeaves, kReturnsArrived };

template <Cluster kBug>
__global__ void peer_kernel(float* out) {
  Shared& shared = shared_storage<Shared>();
  const unsigned peer = cluster_rank() ^ 1;
  if constexpr (kBug != Cluster::kNotStarted) {
    cluster_arrive();
    cluster_wait();
  }
  shared.x[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kBug == Cluster::kReturnsArrived) {
    cluster_arrive();
    return;
  }
  if constexpr (kBug == Cluster::kRight || kBug == Cluster::kLeaves) {
    cluster_arrive();
    cluster_wait();
  }
  const float theirs = peer_shared(shared.x, peer)[(threadIdx.x + 40) % kThreads];
  if (cluster_rank() == 1) out[threadIdx.x] = theirs;
  if constexpr (kBug == Cluster::kRight) {
    cluster_arrive();
    cluster_wait();
  }
}

// One block goes to the barrier, the other has returned.
__global__ void lone_block_kernel(float* out) {
  out[threadIdx.x] = 0.0f;
  if (cluster_rank() == 1) return;
  cluster_arrive();
  cluster_wait();
}

}  // namespace

void run_planted(const std::string& name, float* out) {
  using Kernel = void (*)(float*);
  const struct {
    const char* name;
    Kernel kernel;
  } kernels[] = {
      {"missing_barrier", neighbour_kernel<false>},
      {"with_barrier", neighbour_kernel<true>},
      {"shared_overrun", shared_overrun_kernel},
      {"global_overrun", global_overrun_kernel},
      {"uninitialised", uninitialised_kernel},
      {"divergent", divergent_kernel},
      {"early_return", early_return_kernel},
      {"split_warp", split_warp_kernel},
      {"partial_mask", partial_mask_kernel},
      {"too_much_shared", too_much_shared_kernel},
      {"warp_sync", warp_sync_kernel},
      {"atomic", atomic_kernel},
  };
  for (const auto& entry : kernels) {
    if (name == entry.name) return launch({1, kThreads, sizeof(Shared)}, {}, entry.kernel, out);
  }
  const struct {
    const char* name;
    Kernel kernel;
  } clusters[] = {
      {"cluster", peer_kernel<Cluster::kRight>},
      {"cluster_missing_barrier", peer_kernel<Cluster::kNoBarrier>},
      {"cluster_not_started", peer_kernel<Cluster::kNotStarted>},
      {"cluster_leaves", peer_kernel<Cluster::kLeaves>},
      {"cluster_returns_arrived", peer_kernel<Cluster::kReturnsArrived>},
      {"cluster_lone_block", lone_block_kernel},
  };
  for (const auto& entry : clusters) {
    if (name == entry.name) return launch({2, kThreads, sizeof(Shared), 2}, {}, entry.kernel, out);
  }
  if (name == "ragged_cluster") return launch({3, 32, 0, 2}, {}, lone_block_kernel, out);
  if (name == "ragged_block") return launch({1, 33, 0}, {}, global_overrun_kernel, out);
  if (name == "huge_block") return launch({1, 2048, 0}, {}, global_overrun_kernel, out);
  throw ArgumentError("run_planted: no kernel is called " + name);
}

}  // namespace sf::emu
