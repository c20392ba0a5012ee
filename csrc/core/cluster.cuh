// Thread-block clusters: up to 8 blocks that run at the same time and write each other's shared
// memory. Compute capability 9.0 and up: code that uses this stands inside #if SF_CLUSTERS.
#pragma once

#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SF_CLUSTERS 1
#else
#define SF_CLUSTERS 0
#endif

namespace sf {

constexpr int kMaxCluster = 8;  // what every device with clusters can run

#if SF_CLUSTERS

__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }

// The two halves of a barrier of all threads of the cluster: what a thread wrote before it arrives,
// to global memory or to any block's shared memory, every thread sees after its wait.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }

// Where block `rank` has what this block has at `own`, in shared memory. That block must have
// started and must not have ended: a cluster barrier lies before the first access and after the
// last.
template <class T>
__device__ __forceinline__ T* peer_shared(T* own, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(own, rank));
}

#endif  // SF_CLUSTERS

}  // namespace sf
