// The part of the CUDA driver's interface that shares memory between processes, opened when it is
// first used: what is built without CUDA runs with it, and what is built with it runs without.
//
// Types and numbers are those of cuda.h, which cuda_driver_check.cu holds them against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sf::cuda_driver {

using Result = int;
using Pointer = unsigned long long;
using Handle = unsigned long long;

inline constexpr Result kSuccess = 0;
inline constexpr int kAllocationPinned = 1;
inline constexpr int kLocationDevice = 1;
inline constexpr int kHandleFileDescriptor = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAttributeRdmaWithVmm = 110;

struct Location {
  int type;
  int id;
};

struct AllocationProp {
  int type;
  int handle_types;
  Location location;
  void* windows_only;
  struct {
    unsigned char compression;
    unsigned char rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct AccessDesc {
  Location location;
  int flags;
};

struct Api {
  Result (*cuInit)(unsigned flags);
  Result (*cuGetErrorString)(Result error, const char** text);
  Result (*cuDeviceGet)(int* device, int ordinal);
  Result (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  Result (*cuMemGetAllocationGranularity)(size_t* bytes, const AllocationProp* prop, int option);
  Result (*cuMemCreate)(Handle* handle, size_t nbytes, const AllocationProp* prop,
                        unsigned long long flags);
  Result (*cuMemRelease)(Handle handle);
  Result (*cuMemExportToShareableHandle)(void* shareable, Handle handle, int type,
                                         unsigned long long flags);
  Result (*cuMemImportFromShareableHandle)(Handle* handle, void* shareable, int type);
  Result (*cuMemGetAllocationPropertiesFromHandle)(AllocationProp* prop, Handle handle);
  Result (*cuMemAddressReserve)(Pointer* pointer, size_t nbytes, size_t alignment, Pointer hint,
                                unsigned long long flags);
  Result (*cuMemAddressFree)(Pointer pointer, size_t nbytes);
  Result (*cuMemMap)(Pointer pointer, size_t nbytes, size_t offset, Handle handle,
                     unsigned long long flags);
  Result (*cuMemUnmap)(Pointer pointer, size_t nbytes);
  Result (*cuMemSetAccess)(Pointer pointer, size_t nbytes, const AccessDesc* access, size_t count);
};

// Initialised. MachineError with the loader's or the driver's own words if there is none.
const Api& api();

// MachineError with the name of the call and the driver's text.
void check(Result result, const char* call, const char* file, int line);

}  // namespace sf::cuda_driver
