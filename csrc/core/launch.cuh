// Launching a kernel, with errors that name the file, the line and the driver's text.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/tensor_view.h"

#define SF_CUDA_CHECK(call) ::sf::check_cuda((call), #call, __FILE__, __LINE__)

namespace sf {

inline void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that was reported must not be reported again by the next call
  throw MachineError(call, cudaGetErrorString(error), file, line);
}

// Makes `device` the current one for a scope.
class DeviceScope {
 public:
  explicit DeviceScope(Device device) {
    SF_CUDA_CHECK(cudaGetDevice(&previous_));
    changed_ = previous_ != device.index;
    if (changed_) SF_CUDA_CHECK(cudaSetDevice(device.index));
  }
  ~DeviceScope() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Major number of a device's compute capability. Asks the driver once per device; neither
// synchronises nor allocates, so it may be called while a stream is captured.
inline int capability_major(Device device) {
  constexpr int kCached = 64;
  static std::atomic<int> cache[kCached];  // 0: not asked yet
  const bool cached = device.index >= 0 && device.index < kCached;
  int major = cached ? cache[device.index].load(std::memory_order_relaxed) : 0;
  if (major != 0) return major;
  SF_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index));
  if (cached) cache[device.index].store(major, std::memory_order_relaxed);
  return major;
}

struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 32;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks per thread-block cluster; divides `blocks`; above 1: sm_90 and up
};

// Asynchronous: only errors of the launch itself are seen.
template <class... Params, class... Args>
void launch(LaunchShape shape, Stream stream, void (*kernel)(Params...), const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute cluster{};
  if (shape.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  SF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Params(args)...));
  SF_CUDA_CHECK(cudaGetLastError());
}

// One block per row.
inline unsigned blocks_for_rows(const char* op, int64_t rows) {
  if (rows > INT32_MAX) {
    throw ArgumentError(std::string(op) + ": rows must be below 2^31 on CUDA, got " +
                        std::to_string(rows));
  }
  return static_cast<unsigned>(rows);
}

// Whole warps for `work` items, at most max_threads.
inline unsigned threads_for(int64_t work, unsigned max_threads) {
  const int64_t rounded = (work + 31) / 32 * 32;
  if (rounded >= max_threads) return max_threads;
  return rounded == 0 ? 32 : static_cast<unsigned>(rounded);
}

// The block's shared memory as one struct. All shared memory is dynamic, so that the emulator can
// give it its exact size, poisoned.
template <class T>
__device__ __forceinline__ T& shared_storage() {
#ifdef SF_EMU
  return *static_cast<T*>(emu::shared_memory(sizeof(T)));
#else
  extern __shared__ uint4 sf_shared_storage[];
  return *reinterpret_cast<T*>(sf_shared_storage);
#endif
}

}  // namespace sf
