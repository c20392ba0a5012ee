#include "transport/cuda_driver.h"

#include <dlfcn.h>

#include "core/error.h"

namespace sf::cuda_driver {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* const symbol = ::dlsym(library, name);
  if (symbol == nullptr) throw MachineError(name, ::dlerror(), __FILE__, __LINE__);
  function = reinterpret_cast<Function>(symbol);
}

Api open() {
  // Never closed: the driver has threads and exit handlers of its own.
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw MachineError("CUDA driver", ::dlerror(), __FILE__, __LINE__);
  Api out{};
#define SF_FIND(name) find(library, #name, out.name)
  SF_FIND(cuInit);
  SF_FIND(cuGetErrorString);
  SF_FIND(cuDeviceGet);
  SF_FIND(cuDeviceGetAttribute);
  SF_FIND(cuMemGetAllocationGranularity);
  SF_FIND(cuMemCreate);
  SF_FIND(cuMemRelease);
  SF_FIND(cuMemExportToShareableHandle);
  SF_FIND(cuMemImportFromShareableHandle);
  SF_FIND(cuMemGetAllocationPropertiesFromHandle);
  SF_FIND(cuMemAddressReserve);
  SF_FIND(cuMemAddressFree);
  SF_FIND(cuMemMap);
  SF_FIND(cuMemUnmap);
  SF_FIND(cuMemSetAccess);
#undef SF_FIND
  if (const Result error = out.cuInit(0); error != kSuccess) {
    const char* text = nullptr;
    out.cuGetErrorString(error, &text);
    throw MachineError("cuInit", text == nullptr ? "unknown error" : text, __FILE__, __LINE__);
  }
  return out;
}

}  // namespace

const Api& api() {
  static const Api opened = open();  // if it throws, the next call tries again
  return opened;
}

void check(Result result, const char* call, const char* file, int line) {
  if (result == kSuccess) return;
  const char* text = nullptr;
  api().cuGetErrorString(result, &text);
  throw MachineError(call, text == nullptr ? "error " + std::to_string(result) : text, file, line);
}

}  // namespace sf::cuda_driver
