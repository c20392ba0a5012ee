#include "core/tensor_view.h"

#include "core/error.h"

namespace sf {

std::string Device::str() const {
  return type == DeviceType::kCPU ? "cpu" : "cuda:" + std::to_string(index);
}

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= shape[i];
  return n;
}

bool TensorView::contiguous() const {
  if (numel() == 0) return true;
  int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

std::string TensorView::str() const {
  std::string out = "[";
  for (int i = 0; i < rank; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "] " + dtype_name(dtype);
}

TensorView view_of(void* data, DType dtype, std::initializer_list<int64_t> shape, Device device) {
  if (shape.size() > kMaxRank) {
    throw ArgumentError("view_of: shape must have at most 4 dimensions, got " +
                        std::to_string(shape.size()));
  }
  TensorView view{data, dtype, device, static_cast<int>(shape.size()), {}, {}};
  int i = 0;
  for (int64_t size : shape) view.shape[i++] = size;
  int64_t stride = 1;
  for (i = view.rank - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

}  // namespace sf
