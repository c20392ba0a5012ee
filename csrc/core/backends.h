// Which implementation of an op runs: the one of the device its tensors lie on.
//
//   backend("row_stats", logits.device, &cpu::row_stats, SF_CUDA_FN(cuda::row_stats))(...);
//
// cuda::f is declared in the op's header and defined in <op>_cuda.cu, which is compiled only with
// SF_CUDA; SF_CUDA_FN names it only then.
#pragma once

#include <string>
#include <type_traits>

#include "core/error.h"
#include "core/tensor_view.h"

#ifdef SF_CUDA
#define SF_CUDA_FN(f) (&f)
#else
#define SF_CUDA_FN(f) nullptr
#endif

namespace sf {

template <class... Args>
using OpFn = void (*)(Args...);

template <class... Args>
OpFn<Args...> backend(const char* op, Device device, OpFn<Args...> cpu,
                      std::type_identity_t<OpFn<Args...>> cuda) {
  if (device.type == DeviceType::kCPU) return cpu;
  if (cuda == nullptr) {
    throw ArgumentError(std::string(op) + ": tensors are on " + device.str() +
                        ", but specforge_ext was built without CUDA (SPECFORGE_EXT_CUDA=ON)");
  }
  return cuda;
}

}  // namespace sf
