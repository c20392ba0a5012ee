// Holds cuda_driver.h against the toolkit's own header. Nothing here runs.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "transport/cuda_driver.h"

namespace sf::cuda_driver {
namespace {

static_assert(kSuccess == CUDA_SUCCESS && sizeof(Result) == sizeof(CUresult));
static_assert(std::is_same_v<Pointer, CUdeviceptr>);
static_assert(std::is_same_v<Handle, CUmemGenericAllocationHandle>);
static_assert(sizeof(int) == sizeof(CUdevice));
static_assert(kAllocationPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(kHandleFileDescriptor == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(kAttributeRdmaWithVmm == CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);

#define SF_SAME(ours, our_field, theirs, their_field)                        \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field)); \
  static_assert(sizeof(ours::our_field) == sizeof(theirs::their_field))

static_assert(sizeof(AllocationProp) == sizeof(CUmemAllocationProp));
SF_SAME(AllocationProp, type, CUmemAllocationProp, type);
SF_SAME(AllocationProp, handle_types, CUmemAllocationProp, requestedHandleTypes);
SF_SAME(AllocationProp, location, CUmemAllocationProp, location);
SF_SAME(AllocationProp, windows_only, CUmemAllocationProp, win32HandleMetaData);
SF_SAME(AllocationProp, flags, CUmemAllocationProp, allocFlags);
SF_SAME(AllocationProp, flags.rdma_capable, CUmemAllocationProp, allocFlags.gpuDirectRDMACapable);
SF_SAME(Location, type, CUmemLocation, type);
SF_SAME(Location, id, CUmemLocation, id);
static_assert(sizeof(AccessDesc) == sizeof(CUmemAccessDesc));
SF_SAME(AccessDesc, location, CUmemAccessDesc, location);
SF_SAME(AccessDesc, flags, CUmemAccessDesc, flags);

// Each function's parameters, where ours name them as structures or numbers of the same size.
template <typename Ours, typename Theirs>
struct SameShape : std::false_type {};
template <typename R, typename... A, typename S, typename... B>
struct SameShape<R (*)(A...), S (*)(B...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(A) != sizeof...(B)) {
      return false;
    } else {
      return ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
    }
  }();
};
#define SF_SAME_CALL(name) static_assert(SameShape<decltype(Api::name), decltype(&::name)>::value)
SF_SAME_CALL(cuInit);
SF_SAME_CALL(cuGetErrorString);
SF_SAME_CALL(cuDeviceGet);
SF_SAME_CALL(cuDeviceGetAttribute);
SF_SAME_CALL(cuMemGetAllocationGranularity);
SF_SAME_CALL(cuMemCreate);
SF_SAME_CALL(cuMemRelease);
SF_SAME_CALL(cuMemExportToShareableHandle);
SF_SAME_CALL(cuMemImportFromShareableHandle);
SF_SAME_CALL(cuMemGetAllocationPropertiesFromHandle);
SF_SAME_CALL(cuMemAddressReserve);
SF_SAME_CALL(cuMemAddressFree);
SF_SAME_CALL(cuMemMap);
SF_SAME_CALL(cuMemUnmap);
SF_SAME_CALL(cuMemSetAccess);

}  // namespace
}  // namespace sf::cuda_driver
