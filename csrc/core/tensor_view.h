// A tensor that somebody else owns: pointer, shape, strides, dtype, device.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/dtype.h"

namespace sf {

enum class DeviceType : uint8_t { kCPU, kCUDA };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;  // ordinal of the CUDA device; 0 on the CPU

  bool operator==(const Device&) const = default;
  std::string str() const;  // "cpu", "cuda:1"
};

// A cudaStream_t, opaque so that headers need no CUDA. Ignored on the CPU.
struct Stream {
  void* handle = nullptr;
};

inline constexpr int kMaxRank = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = kF32;
  Device device;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> strides{};  // in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const;
  int64_t nbytes() const { return numel() * static_cast<int64_t>(dtype_size(dtype)); }
  bool contiguous() const;
  std::string str() const;  // "[4, 7] f32"
};

// A contiguous view. For callers in C++; the Python border makes its own.
TensorView view_of(void* data, DType dtype, std::initializer_list<int64_t> shape,
                   Device device = {});

}  // namespace sf
