// Bytes that somebody else owns as a DLPack capsule: what torch.from_dlpack takes for memory of any
// device. The structures are those of DLPack 0.x (dmlc/dlpack, dlpack.h), its "dltensor" capsules.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

namespace sf::dlpack {

inline constexpr int kCpu = 1;
inline constexpr int kCuda = 2;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;  // 0: integer, 1: unsigned integer, 2: IEEE floating point, 4: bfloat16
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // nullptr: contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

inline constexpr DataType kByte{1, 8, 1};

// Of a contiguous tensor of one or two dimensions.
struct Shape {
  int32_t rank;
  int64_t sizes[2];
};

// What a capsule points to: the tensor, and the owner of its bytes until the last view is gone.
struct OwnedView {
  ManagedTensor managed;
  Shape shape;
  std::shared_ptr<void> owner;
};

inline void drop_capsule(PyObject* capsule) {
  // A capsule that was taken has another name, and the taker deletes.
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

// `owner` is let go by any thread, with the GIL or without.
inline pybind11::capsule view(void* data, DataType dtype, const Shape& shape, Device device,
                              std::shared_ptr<void> owner) {
  auto* out = new OwnedView{};
  out->shape = shape;
  out->owner = std::move(owner);
  out->managed.tensor = {data, device, shape.rank, dtype, out->shape.sizes, nullptr, 0};
  out->managed.context = out;
  out->managed.deleter = [](ManagedTensor* self) { delete static_cast<OwnedView*>(self->context); };
  return pybind11::capsule(&out->managed, "dltensor", &drop_capsule);
}

}  // namespace sf::dlpack
