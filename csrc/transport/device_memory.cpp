#include "transport/device_memory.h"

#include <string>

#include "core/error.h"
#include "transport/cuda_driver.h"

#define SF_DRIVER(call) cuda_driver::check(cuda_driver::api().call, #call, __FILE__, __LINE__)

namespace sf {
namespace {

using cuda_driver::AllocationProp;
using cuda_driver::api;
using cuda_driver::Handle;

// Mappings keep the memory: the handle is needed only until there is one.
class OwnedHandle {
 public:
  OwnedHandle() = default;
  ~OwnedHandle() {
    if (held_) api().cuMemRelease(handle_);
  }
  OwnedHandle(const OwnedHandle&) = delete;
  OwnedHandle& operator=(const OwnedHandle&) = delete;
  Handle* receive() {
    held_ = true;
    return &handle_;
  }
  void none() { held_ = false; }
  Handle get() const { return handle_; }

 private:
  Handle handle_ = 0;
  bool held_ = false;
};

int device_of(int ordinal) {
  int device = 0;
  SF_DRIVER(cuDeviceGet(&device, ordinal));
  return device;
}

AllocationProp prop_for(int device) {
  AllocationProp prop{};
  prop.type = cuda_driver::kAllocationPinned;
  prop.handle_types = cuda_driver::kHandleFileDescriptor;
  prop.location = {cuda_driver::kLocationDevice, device};
  int rdma = 0;
  SF_DRIVER(cuDeviceGetAttribute(&rdma, cuda_driver::kAttributeRdmaWithVmm, device));
  prop.flags.rdma_capable = rdma != 0;
  return prop;
}

uint64_t whole_pages(const AllocationProp& prop, uint64_t nbytes) {
  size_t page = 0;
  SF_DRIVER(cuMemGetAllocationGranularity(&page, &prop, cuda_driver::kGranularityMinimum));
  return (nbytes + page - 1) / page * page;
}

}  // namespace

std::unique_ptr<DeviceMemory> DeviceMemory::create(int device, uint64_t nbytes) {
  const AllocationProp prop = prop_for(device_of(device));
  const uint64_t total = whole_pages(prop, nbytes);
  std::unique_ptr<DeviceMemory> out(new DeviceMemory);
  OwnedHandle handle;
  const auto result = api().cuMemCreate(handle.receive(), total, &prop, 0);
  if (result != cuda_driver::kSuccess) handle.none();
  const std::string call =
      "cuMemCreate of " + std::to_string(total) + " bytes on cuda:" + std::to_string(device);
  cuda_driver::check(result, call.c_str(), __FILE__, __LINE__);
  int fd = -1;
  SF_DRIVER(cuMemExportToShareableHandle(&fd, handle.get(), cuda_driver::kHandleFileDescriptor, 0));
  out->fd_ = FileDescriptor(fd);
  out->map(handle.get(), device, total);
  return out;
}

std::unique_ptr<DeviceMemory> DeviceMemory::import(int device, uint64_t nbytes, int fd) {
  std::unique_ptr<DeviceMemory> out(new DeviceMemory);
  OwnedHandle handle;
  void* const shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  const auto result = api().cuMemImportFromShareableHandle(handle.receive(), shareable,
                                                           cuda_driver::kHandleFileDescriptor);
  if (result != cuda_driver::kSuccess) handle.none();
  cuda_driver::check(result, "cuMemImportFromShareableHandle", __FILE__, __LINE__);
  // The size of a page is that of the device which holds the memory.
  AllocationProp prop{};
  SF_DRIVER(cuMemGetAllocationPropertiesFromHandle(&prop, handle.get()));
  out->map(handle.get(), device, whole_pages(prop, nbytes));
  return out;
}

void DeviceMemory::map(Handle handle, int device, uint64_t nbytes) {
  SF_DRIVER(cuMemAddressReserve(&pointer_, nbytes, 0, 0, 0));
  nbytes_ = nbytes;
  SF_DRIVER(cuMemMap(pointer_, nbytes, 0, handle, 0));
  mapped_ = true;
  const cuda_driver::AccessDesc access{{cuda_driver::kLocationDevice, device_of(device)},
                                       cuda_driver::kAccessReadWrite};
  SF_DRIVER(cuMemSetAccess(pointer_, nbytes, &access, 1));
}

DeviceMemory::~DeviceMemory() {
  // At the end of a process the driver may be gone before this: nothing is left to give back then.
  if (mapped_) api().cuMemUnmap(pointer_, nbytes_);
  if (nbytes_ != 0) api().cuMemAddressFree(pointer_, nbytes_);
}

}  // namespace sf
