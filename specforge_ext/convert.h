// torch.Tensor -> sf::TensorView, without torch: its attributes are read through Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <unordered_map>

#include "core/error.h"
#include "core/tensor_view.h"

namespace sf {

inline DType dtype_of(pybind11::handle tensor) {
  static const std::unordered_map<std::string, DType> kNames = {
      {"torch.float32", kF32}, {"torch.bfloat16", kBF16}, {"torch.float16", kF16},
      {"torch.float64", kF64}, {"torch.int32", kI32},     {"torch.int64", kI64},
      {"torch.uint8", kU8},    {"torch.bool", kBool},
  };
  const std::string name = pybind11::str(tensor.attr("dtype"));
  const auto found = kNames.find(name);
  if (found == kNames.end()) throw ArgumentError("tensor dtype " + name + " is not supported");
  return found->second;
}

inline Device device_of(pybind11::handle tensor) {
  const pybind11::object device = tensor.attr("device");
  const std::string type = pybind11::str(device.attr("type"));
  if (type == "cpu") return {};
  if (type != "cuda") throw ArgumentError("tensor must be on cpu or cuda, got " + type);
  return {DeviceType::kCUDA, device.attr("index").cast<int>()};
}

inline TensorView view_of(pybind11::handle tensor) {
  TensorView view;
  view.dtype = dtype_of(tensor);
  view.device = device_of(tensor);
  const pybind11::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  view.rank = static_cast<int>(shape.size());
  if (view.rank > kMaxRank) {
    throw ArgumentError("tensor must have at most 4 dimensions, got " + std::to_string(view.rank));
  }
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = shape[i].cast<int64_t>();
    view.strides[i] = strides[i].cast<int64_t>();
  }
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return view;
}

}  // namespace sf

namespace pybind11::detail {

template <>
struct type_caster<sf::TensorView> {
  PYBIND11_TYPE_CASTER(sf::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!hasattr(source, "data_ptr")) return false;  // not a tensor: pybind11 raises TypeError
    value = sf::view_of(source);
    return true;
  }
};

}  // namespace pybind11::detail
