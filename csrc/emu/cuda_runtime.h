// Test only: what the .cu files of this library use of CUDA, on top of the emulator. It is found in
// place of CUDA's own header because csrc/emu/ comes first in the emulator's include path.
#pragma once

#include <bit>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emu/emu.h"

#define SF_EMU 1

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- barriers and warp collectives
// ---------------------------------------------------------------

#define __syncthreads() ::sf::emu::sync_threads(__FILE__, __LINE__)
#define __syncwarp(mask) ::sf::emu::sync_warp(mask, __FILE__, __LINE__)
#define __shfl_sync(mask, value, source) \
  ::sf::emu::shuffle(mask, value, source, "__shfl_sync", __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  ::sf::emu::shuffle(mask, value, ::sf::emu::lane() ^ (bits), "__shfl_xor_sync", __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, delta)                                                         \
  ::sf::emu::shuffle(                                                                              \
      mask, value, ::sf::emu::lane() >= (delta) ? ::sf::emu::lane() - (delta) : ::sf::emu::lane(), \
      "__shfl_up_sync", __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) \
  ::sf::emu::ballot(mask, predicate, "__ballot_sync", __FILE__, __LINE__)
#define __any_sync(mask, predicate) \
  (::sf::emu::ballot(mask, predicate, "__any_sync", __FILE__, __LINE__) != 0)

// ---- clusters ----------------------------------------------------------------------------------

#define __cluster_barrier_arrive() ::sf::emu::arrive_cluster(__FILE__, __LINE__)
#define __cluster_barrier_wait() ::sf::emu::wait_cluster(__FILE__, __LINE__)
#define __cluster_map_shared_rank(own, rank) ::sf::emu::map_shared(own, rank)
#define __clusterRelativeBlockRank() ::sf::emu::rank_in_cluster()
#define __clusterSizeInBlocks() ::sf::emu::blocks_in_cluster()

namespace sf::emu {

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* what, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, what, file, line)[source % 32];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* what, const char* file,
                       int line) {
  const uint64_t* lanes = exchange(mask, predicate, what, file, line);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>(lanes[i]) << i;
  return votes;
}

}  // namespace sf::emu

// Integers only: a float atomic would make a kernel's result depend on the order of threads.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "float atomics are not deterministic");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// ---- arithmetic
// ------------------------------------------------------------------------------------

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

// ---- runtime
// ---------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches return their error here
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "no error";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

// A device with clusters, so that every path can run.
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 9;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  const bool grid_fits = grid.x && grid.y && grid.z && grid.x <= INT_MAX && grid.y <= 65535;
  if (!grid_fits || block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) cluster = config->attrs[i].val.clusterDim.x;
  struct Closure {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } closure{kernel, {static_cast<Params>(args)...}};
  const auto body = [](void* memory) {
    auto& call = *static_cast<Closure*>(memory);
    std::apply(call.kernel, call.params);
  };
  ::sf::emu::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster,
                      config->dynamicSmemBytes, body, &closure);
  return cudaSuccess;
}
