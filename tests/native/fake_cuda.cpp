// Test only: the part of the CUDA driver that the arena and the preflight use, over memfds. Memory
// "of a device" is a file that processes map, so that what is shared, kept and dropped is as with
// the real one; the host may look at it too. Nothing here says what a GPU does in time.
//
// FAKE_CUDA_DEVICES: how many (2). FAKE_CUDA_ZERO: attributes that are 0, "113,116".
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "transport/cuda_driver.h"

using sf::cuda_driver::AccessDesc;
using sf::cuda_driver::AllocationProp;
using sf::cuda_driver::Handle;
using sf::cuda_driver::Pointer;
using sf::cuda_driver::Result;

namespace {

constexpr size_t kPage = 2 << 20;
constexpr size_t kMemoryBytes = size_t{1} << 30;
constexpr Result kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101;

struct Range {
  size_t nbytes;
  int fd = -1;
};

std::mutex mutex;
std::map<Handle, int> handles;  // -> memfd
std::map<Pointer, Range> ranges;
Handle last_handle = 0;
int num_flushes = 0;

int num_devices() {
  const char* text = std::getenv("FAKE_CUDA_DEVICES");
  return text == nullptr ? 2 : std::atoi(text);
}

size_t size_of(int fd) {
  struct stat info;
  return ::fstat(fd, &info) == 0 ? static_cast<size_t>(info.st_size) : 0;
}

Handle keep(int fd) {
  handles[++last_handle] = fd;
  return last_handle;
}

void* as_host(Pointer pointer) { return reinterpret_cast<void*>(pointer); }

}  // namespace

extern "C" {

// For tests: handles, and ranges of addresses, that were not given back.
int fake_cuda_live() {
  const std::lock_guard lock(mutex);
  return static_cast<int>(handles.size() + ranges.size());
}

// For tests: how often remote writes were flushed.
int fake_cuda_flushes() {
  const std::lock_guard lock(mutex);
  return num_flushes;
}

Result cuFlushGPUDirectRDMAWrites(int target, int scope) {
  const std::lock_guard lock(mutex);
  ++num_flushes;
  return target == 0 && scope == 100 ? 0 : kInvalidValue;
}

Result cuInit(unsigned) { return 0; }

Result cuGetErrorString(Result error, const char** text) {
  *text = error == kOutOfMemory     ? "out of memory"
          : error == kInvalidDevice ? "invalid device ordinal"
                                    : "invalid argument";
  return 0;
}

Result cuDeviceGetCount(int* count) {
  *count = num_devices();
  return 0;
}

Result cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < num_devices() ? 0 : kInvalidDevice;
}

Result cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, static_cast<size_t>(size), "Fake %d", device);
  return 0;
}

Result cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* zero = std::getenv("FAKE_CUDA_ZERO");
  const std::string listed = "," + std::string(zero == nullptr ? "" : zero) + ",";
  const bool is_zero = listed.find("," + std::to_string(attribute) + ",") != std::string::npos;
  *value = attribute == 20 || is_zero ? 0 : 1;
  return 0;
}

Result cuDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return 0;
}

Result cuMemGetAllocationGranularity(size_t* bytes, const AllocationProp* prop, int) {
  *bytes = kPage;
  return prop->type == 1 ? 0 : kInvalidValue;
}

Result cuMemCreate(Handle* handle, size_t nbytes, const AllocationProp* prop, unsigned long long) {
  if (nbytes % kPage != 0 || prop->handle_types != 1) return kInvalidValue;
  if (nbytes > kMemoryBytes) return kOutOfMemory;
  const int fd = ::memfd_create("fake_cuda", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(nbytes)) != 0) return kOutOfMemory;
  const std::lock_guard lock(mutex);
  *handle = keep(fd);
  return 0;
}

Result cuMemRelease(Handle handle) {
  const std::lock_guard lock(mutex);
  const auto it = handles.find(handle);
  if (it == handles.end()) return kInvalidValue;
  ::close(it->second);
  handles.erase(it);
  return 0;
}

Result cuMemExportToShareableHandle(void* shareable, Handle handle, int, unsigned long long) {
  const std::lock_guard lock(mutex);
  const auto it = handles.find(handle);
  if (it == handles.end()) return kInvalidValue;
  const int fd = ::fcntl(it->second, F_DUPFD_CLOEXEC, 0);
  std::memcpy(shareable, &fd, sizeof fd);
  return 0;
}

Result cuMemImportFromShareableHandle(Handle* handle, void* shareable, int) {
  const int fd =
      ::fcntl(static_cast<int>(reinterpret_cast<intptr_t>(shareable)), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return kInvalidValue;
  const std::lock_guard lock(mutex);
  *handle = keep(fd);
  return 0;
}

Result cuMemGetAllocationPropertiesFromHandle(AllocationProp* prop, Handle handle) {
  const std::lock_guard lock(mutex);
  if (handles.count(handle) == 0) return kInvalidValue;
  *prop = {};
  prop->type = 1;
  prop->handle_types = 1;
  prop->location = {1, 0};
  return 0;
}

Result cuMemAddressReserve(Pointer* pointer, size_t nbytes, size_t, Pointer, unsigned long long) {
  if (nbytes == 0 || nbytes % kPage != 0) return kInvalidValue;
  void* at = ::mmap(nullptr, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return kOutOfMemory;
  *pointer = reinterpret_cast<Pointer>(at);
  const std::lock_guard lock(mutex);
  ranges[*pointer] = {nbytes};
  return 0;
}

Result cuMemAddressFree(Pointer pointer, size_t nbytes) {
  const std::lock_guard lock(mutex);
  const auto it = ranges.find(pointer);
  // Still mapped: the real driver refuses that too.
  if (it == ranges.end() || it->second.nbytes != nbytes || it->second.fd >= 0) return kInvalidValue;
  ::munmap(as_host(pointer), nbytes);
  ranges.erase(it);
  return 0;
}

Result cuMemMap(Pointer pointer, size_t nbytes, size_t, Handle handle, unsigned long long) {
  const std::lock_guard lock(mutex);
  const auto range = ranges.find(pointer);
  const auto held = handles.find(handle);
  if (range == ranges.end() || held == handles.end()) return kInvalidValue;
  if (nbytes > range->second.nbytes || nbytes > size_of(held->second)) return kInvalidValue;
  range->second.fd = ::fcntl(held->second, F_DUPFD_CLOEXEC, 0);
  return 0;
}

Result cuMemSetAccess(Pointer pointer, size_t nbytes, const AccessDesc* access, size_t count) {
  const std::lock_guard lock(mutex);
  const auto it = ranges.find(pointer);
  if (it == ranges.end() || it->second.fd < 0 || count != 1) return kInvalidValue;
  const int protection = access->flags == 3 ? PROT_READ | PROT_WRITE : PROT_READ;
  void* at = ::mmap(as_host(pointer), nbytes, protection, MAP_SHARED | MAP_FIXED, it->second.fd, 0);
  return at == MAP_FAILED ? kOutOfMemory : 0;
}

Result cuMemUnmap(Pointer pointer, size_t nbytes) {
  const std::lock_guard lock(mutex);
  const auto it = ranges.find(pointer);
  if (it == ranges.end() || it->second.fd < 0) return kInvalidValue;
  ::mmap(as_host(pointer), nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  ::close(it->second.fd);
  it->second.fd = -1;
  return 0;
}

}  // extern "C"
