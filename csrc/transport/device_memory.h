// One allocation in a GPU's memory that other processes map too: made by cuMemCreate, handed on as
// a file descriptor. The memory lives until the last process that maps it has ended, or has
// dropped it, however its maker ended. (What cudaMalloc and cudaIpcGetMemHandle share ends with its
// maker, and must not even be freed before every other process has closed it.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "transport/file_descriptor.h"

namespace sf {

class DeviceMemory {
 public:
  // At least `nbytes` on the device of this ordinal, of unspecified content. MachineError if there
  // is no driver, no such device, or not so much memory.
  static std::unique_ptr<DeviceMemory> create(int device, uint64_t nbytes);

  // What create() made of the same `nbytes` in another process, for kernels of `device`.
  static std::unique_ptr<DeviceMemory> import(int device, uint64_t nbytes, int fd);

  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // Of the device: the host must not look there.
  std::byte* data() const { return reinterpret_cast<std::byte*>(pointer_); }
  // -1 unless this process made it.
  int fd() const { return fd_.get(); }

 private:
  DeviceMemory() = default;
  void map(unsigned long long handle, int device, uint64_t nbytes);

  FileDescriptor fd_;
  unsigned long long pointer_ = 0;
  uint64_t nbytes_ = 0;
  bool mapped_ = false;
};

}  // namespace sf
