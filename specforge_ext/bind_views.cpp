// Tensors of a ref as views of the memory where its sample lies: one call for all of a sample.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/error.h"
#include "dlpack.h"
#include "ref_records.h"
#include "transport/arena.h"

namespace sf {
namespace {

// A buffer of Python's, kept until the last view of it is gone, which any thread may drop.
class Buffer {
 public:
  explicit Buffer(const py::object& owner) {
    if (PyObject_GetBuffer(owner.ptr(), &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Buffer() {
    const py::gil_scoped_acquire locked;
    PyBuffer_Release(&buffer_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(buffer_.buf); }
  int64_t nbytes() const { return buffer_.len; }

 private:
  Py_buffer buffer_;
};

constexpr dlpack::DataType kFloat{2, 32, 1};
constexpr std::array<dlpack::DataType, kRefDtypes.size()> kDtypes = {
    {kFloat, {4, 16, 1}, {2, 16, 1}, {0, 64, 1}, {0, 32, 1}, dlpack::kByte}};

void expect_within(const RefTensor& tensor, int64_t available) {
  const auto fits = [&](int64_t offset, int64_t nbytes) {
    return offset <= available && nbytes <= available - offset;
  };
  if (fits(tensor.offset, tensor.nbytes) &&
      (!tensor.encoded() || fits(tensor.scales_offset, tensor.scales_nbytes())))
    return;
  throw ArgumentError("tensor " + std::string(tensor.name) + ": must lie within " +
                      std::to_string(available) + " bytes, got " + std::to_string(tensor.nbytes) +
                      " at " + std::to_string(tensor.offset));
}

// Makes views of memory that `owner` keeps. `from_dlpack`: torch's.
class Views {
 public:
  Views(const std::byte* data, int64_t nbytes, std::shared_ptr<void> owner, py::handle from_dlpack)
      : data_(data), nbytes_(nbytes), owner_(std::move(owner)), from_dlpack_(from_dlpack) {}

  Views(const std::shared_ptr<Buffer>& buffer, py::handle from_dlpack)
      : Views(buffer->data(), buffer->nbytes(), buffer, from_dlpack) {}

  // Of its codes, if it is encoded. ArgumentError if it does not lie within the memory.
  py::object values(const RefTensor& tensor) const {
    expect_within(tensor, nbytes_);
    const auto dtype =
        tensor.encoded() ? dlpack::kByte : kDtypes[static_cast<size_t>(tensor.dtype)];
    return view(tensor.offset, dtype, {tensor.rank, {tensor.shape[0], tensor.shape[1]}});
  }

  py::object scales(const RefTensor& tensor) const {
    expect_within(tensor, nbytes_);
    return view(tensor.scales_offset, kFloat, {2, {tensor.shape[0], tensor.num_scales}});
  }

 private:
  py::object view(int64_t offset, dlpack::DataType dtype, const dlpack::Shape& shape) const {
    // torch knows no read-only tensors. A write through a reader's view faults: its pages are.
    auto* const data = const_cast<std::byte*>(data_) + offset;
    return from_dlpack_(dlpack::view(data, dtype, shape, {dlpack::kCpu, 0}, owner_));
  }

  const std::byte* data_;
  int64_t nbytes_;
  std::shared_ptr<void> owner_;
  py::handle from_dlpack_;
};

std::vector<RefTensor> take_tensors(Taker* taker, const py::tuple& tensors) {
  std::vector<RefTensor> out;
  for (const py::handle from : tensors) {
    out.push_back(taker->take_tensor(from));
    if (!taker->ok || !ref_tensor_is_valid(out.back(), out[0].shape[0]))
      throw ArgumentError("tensors: must be those of a valid ref, got " +
                          py::repr(from).cast<std::string>());
  }
  return out;
}

py::typing::List<py::object> tensor_views(
    const py::object& extent, const py::typing::Tuple<py::object, py::ellipsis>& tensors,
    const py::object& from_dlpack) {
  Taker taker;
  const Views views(std::make_shared<Buffer>(extent), from_dlpack);
  py::typing::List<py::object> out;
  for (const RefTensor& tensor : take_tensors(&taker, tensors)) {
    out.append(views.values(tensor));
    if (tensor.encoded()) out.append(views.scales(tensor));
  }
  return out;
}

py::object feature_of(const Views& views, const RefTensor& tensor) {
  if (!tensor.encoded()) return views.values(tensor);
  Record out(records().encoded_feature);
  out.set(SF_NAME("codes"), views.values(tensor));
  out.set(SF_NAME("scales"), views.scales(tensor));
  out.set(SF_NAME("dtype"), py::object(records().dtypes[dtype_text(tensor.dtype)]));
  return out.take();
}

// Of tensors that are valid, each and together: that says all that a Prompt checks when it is made.
py::object sample_of(const Views& views, const std::vector<RefTensor>& tensors,
                     const py::object& sample_id) {
  Record prompt(records().prompt);
  py::dict features;
  for (const RefTensor& tensor : tensors) {
    if (tensor.name == "input_ids") {
      prompt.set(SF_NAME("input_ids"), views.values(tensor));
    } else if (tensor.name == "loss_mask") {
      prompt.set(SF_NAME("loss_mask"), views.values(tensor));
    } else {
      features[text(tensor.name)] = feature_of(views, tensor);
    }
  }
  prompt.set(SF_NAME("sample_id"), sample_id);
  Record out(records().stored_sample);
  out.set(SF_NAME("prompt"), prompt.take());
  out.set(SF_NAME("features"), py::object(std::move(features)));
  return out.take();
}

py::object stored_sample(const py::object& extent, const py::object& ref,
                         const py::object& from_dlpack) {
  Taker taker;
  const auto tensors = take_tensors(&taker, py::tuple(ref.attr(SF_NAME("tensors"))));
  if (!ref_names_fit(tensors))
    throw ArgumentError("tensors: must have unique names, with input_ids and loss_mask");
  const Views views(std::make_shared<Buffer>(extent), from_dlpack);
  return sample_of(views, tensors, ref.attr(SF_NAME("sample_id")));
}

}  // namespace

py::object open_sample(Consumer& self, const py::object& ref, std::string_view store,
                       std::string_view layout_hash, const py::object& from_dlpack) {
  Taker taker;
  const Ref taken = taker.take(ref);
  if (!taker.ok || !ref_is_valid(taken) || taken.store != store || taken.layout_hash != layout_hash)
    return py::none();
  const auto lease = std::make_shared<Lease>(
      self.lease({static_cast<uint32_t>(taken.slot), static_cast<uint64_t>(taken.generation)}));
  if (lease->nbytes() != static_cast<uint64_t>(taken.nbytes)) return py::none();
  const Views views(lease->data(), taken.nbytes, lease, from_dlpack);
  return sample_of(views, taken.tensors, ref.attr(SF_NAME("sample_id")));
}

void bind_views(py::module_& m) {
  m.def("tensor_views", &tensor_views, py::arg("extent"), py::arg("tensors"),
        py::arg("from_dlpack"),
        "Views of a buffer, for each of a ref's tensors; codes, then scales of encoded ones.");
  m.def("stored_sample", &stored_sample, py::arg("extent"), py::arg("ref"), py::arg("from_dlpack"),
        "A StoredSample of such views. ValueError for what does not lie in the buffer.");
}

}  // namespace sf
