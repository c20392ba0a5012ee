// SampleRefs between Python's records, plain data and bytes; and the tensors of one as views of a
// buffer. store/ref.py says why a ref is refused, this says fast that it is not.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"
#include "core/error.h"
#include "dlpack.h"
#include "transport/sample_ref.h"

namespace py = pybind11;

namespace sf {
namespace {

// Names of attributes, each made once.
#define SF_NAME(name)                                               \
  [] {                                                              \
    static const py::handle held(PyUnicode_InternFromString(name)); \
    return held;                                                    \
  }()

std::optional<int64_t> integer(py::handle value) {
  if (!PyLong_CheckExact(value.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) return std::nullopt;
  return number;
}

std::optional<std::string_view> ascii(py::handle value) {
  if (!PyUnicode_CheckExact(value.ptr()) || !PyUnicode_IS_ASCII(value.ptr())) return std::nullopt;
  return std::string_view(static_cast<const char*>(PyUnicode_DATA(value.ptr())),
                          static_cast<size_t>(PyUnicode_GET_LENGTH(value.ptr())));
}

// Takes attributes of Python's records; texts lie in objects that it keeps. What is not of exactly
// the right type makes `ok` false.
class Taker {
 public:
  int64_t take_int(py::handle from, py::handle name) { return checked(integer(from.attr(name))); }

  std::string_view take_text(py::handle from, py::handle name) {
    held_.push_back(from.attr(name));
    return checked(ascii(held_.back()));
  }

  std::optional<int64_t> take_checksum(py::handle from) {
    const py::object value = from.attr(SF_NAME("checksum"));
    if (value.is_none()) return std::nullopt;
    return checked(integer(value));
  }

  void take_shape(py::handle from, RefTensor* out) {
    const py::object shape = from.attr(SF_NAME("shape"));
    if (!PyTuple_CheckExact(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) > kMaxRefRank) {
      ok = false;
      return;
    }
    out->rank = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    for (int i = 0; i < out->rank; ++i)
      out->shape[static_cast<size_t>(i)] = checked(integer(PyTuple_GET_ITEM(shape.ptr(), i)));
  }

  RefTensor take_tensor(py::handle from) {
    RefTensor out;
    out.name = take_text(from, SF_NAME("name"));
    out.dtype = ref_dtype(take_text(from, SF_NAME("dtype")));
    out.encoding = ref_encoding(take_text(from, SF_NAME("encoding")));
    take_shape(from, &out);
    out.offset = take_int(from, SF_NAME("offset"));
    out.nbytes = take_int(from, SF_NAME("nbytes"));
    out.checksum = take_checksum(from);
    out.num_scales = take_int(from, SF_NAME("num_scales"));
    out.scales_offset = take_int(from, SF_NAME("scales_offset"));
    return out;
  }

  Ref take(py::handle from) {
    Ref out;
    out.sample_id = take_text(from, SF_NAME("sample_id"));
    out.store = take_text(from, SF_NAME("store"));
    out.layout_hash = take_text(from, SF_NAME("layout_hash"));
    out.slot = take_int(from, SF_NAME("slot"));
    out.generation = take_int(from, SF_NAME("generation"));
    out.num_tokens = take_int(from, SF_NAME("num_tokens"));
    out.nbytes = take_int(from, SF_NAME("nbytes"));
    const py::object tensors = from.attr(SF_NAME("tensors"));
    ok = ok && PyTuple_CheckExact(tensors.ptr()) &&
         PyTuple_GET_SIZE(tensors.ptr()) <= kMaxRefTensors;
    if (!ok) return out;
    const Py_ssize_t num_tensors = PyTuple_GET_SIZE(tensors.ptr());
    out.tensors.reserve(static_cast<size_t>(num_tensors));
    for (Py_ssize_t i = 0; i < num_tensors && ok; ++i)
      out.tensors.push_back(take_tensor(PyTuple_GET_ITEM(tensors.ptr(), i)));
    return out;
  }

  bool ok = true;

 private:
  template <typename T>
  T checked(const std::optional<T>& value) {
    if (!value) ok = false;
    return value.value_or(T{});
  }

  std::vector<py::object> held_;
};

bool is_valid(const py::object& ref) {
  Taker taker;
  const Ref taken = taker.take(ref);
  return taker.ok && ref_is_valid(taken);
}

std::optional<py::bytes> to_bytes(const py::object& ref) {
  Taker taker;
  const Ref taken = taker.take(ref);
  if (!taker.ok || !ref_is_valid(taken)) return std::nullopt;
  return py::bytes(ref_to_bytes(taken));
}

py::object text(std::string_view ascii) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_FromStringAndSize(ascii.data(), static_cast<Py_ssize_t>(ascii.size())));
}

// The same object for every ref.
template <size_t N>
std::array<py::handle, N> texts_of(const std::array<std::string_view, N>& names) {
  std::array<py::handle, N> out;
  for (size_t i = 0; i < N; ++i) out[i] = text(names[i]).release();
  return out;
}

py::handle dtype_text(int dtype) {
  static const auto texts = [] {
    std::array<std::string_view, kRefDtypes.size()> names;
    for (size_t i = 0; i < names.size(); ++i) names[i] = kRefDtypes[i].name;
    return texts_of(names);
  }();
  return texts[static_cast<size_t>(dtype)];
}

py::handle encoding_text(int encoding) {
  static const auto texts = texts_of(kRefEncodings);
  return texts[static_cast<size_t>(encoding)];
}

// Python's frozen records, filled as unpickling fills them: their own way in is an assignment that
// they refuse, and its detour.
class Record {
 public:
  explicit Record(py::handle type) {
    auto* const plain = reinterpret_cast<PyTypeObject*>(type.ptr());
    const py::tuple nothing;
    object_ = py::reinterpret_steal<py::object>(plain->tp_new(plain, nothing.ptr(), nullptr));
    if (!object_) throw py::error_already_set();
  }
  void set(py::handle name, const py::object& value) {
    if (!value || PyObject_GenericSetAttr(object_.ptr(), name.ptr(), value.ptr()) != 0)
      throw py::error_already_set();
  }
  void set(py::handle name, py::handle value) {
    set(name, py::reinterpret_borrow<py::object>(value));
  }
  void set(py::handle name, int64_t value) { set(name, py::object(py::int_(value))); }
  py::object take() { return std::move(object_); }

 private:
  py::object object_;
};

struct Records {
  py::object sample_ref;
  py::object tensor_ref;
  py::object prompt;
  py::object encoded_feature;
  py::object stored_sample;
  py::object dtypes;
};

const Records& records() {
  // A plain static would be waited for with the GIL held, which an import lets go.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Records> storage;
  return storage
      .call_once_and_store_result([] {
        const auto module = py::module_::import("specforge_ext.records");
        return Records{module.attr("SampleRef"),    module.attr("TensorRef"),
                       module.attr("Prompt"),       module.attr("EncodedFeature"),
                       module.attr("StoredSample"), module.attr("DTYPES")};
      })
      .get_stored();
}

py::object make_tensor(const RefTensor& tensor) {
  Record out(records().tensor_ref);
  py::tuple shape(static_cast<size_t>(tensor.rank));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = py::int_(tensor.shape[i]);
  out.set(SF_NAME("name"), text(tensor.name));
  out.set(SF_NAME("dtype"), dtype_text(tensor.dtype));
  out.set(SF_NAME("shape"), py::object(std::move(shape)));
  out.set(SF_NAME("offset"), tensor.offset);
  out.set(SF_NAME("nbytes"), tensor.nbytes);
  out.set(SF_NAME("encoding"), encoding_text(tensor.encoding));
  out.set(SF_NAME("checksum"),
          tensor.checksum ? py::object(py::int_(*tensor.checksum)) : py::none());
  out.set(SF_NAME("num_scales"), tensor.num_scales);
  out.set(SF_NAME("scales_offset"), tensor.scales_offset);
  return out.take();
}

py::object make_ref(const Ref& ref) {
  Record out(records().sample_ref);
  py::tuple tensors(ref.tensors.size());
  for (size_t i = 0; i < ref.tensors.size(); ++i) tensors[i] = make_tensor(ref.tensors[i]);
  out.set(SF_NAME("sample_id"), text(ref.sample_id));
  out.set(SF_NAME("store"), text(ref.store));
  out.set(SF_NAME("slot"), ref.slot);
  out.set(SF_NAME("generation"), ref.generation);
  out.set(SF_NAME("layout_hash"), text(ref.layout_hash));
  out.set(SF_NAME("num_tokens"), ref.num_tokens);
  out.set(SF_NAME("nbytes"), ref.nbytes);
  out.set(SF_NAME("tensors"), py::object(std::move(tensors)));
  return out.take();
}

py::object from_bytes(const py::bytes& data) {
  const auto ref = ref_from_bytes(std::string_view(data));
  return ref ? make_ref(*ref) : py::none();
}

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

// The tensors of a ref as views of a buffer. `from_dlpack`: torch's.
class Viewer {
 public:
  Viewer(const py::object& extent, py::handle from_dlpack)
      : buffer_(std::make_shared<Buffer>(extent)), from_dlpack_(from_dlpack) {}

  RefTensor take(py::handle from, std::optional<int64_t> num_tokens) {
    const RefTensor tensor = taker_.take_tensor(from);
    if (!taker_.ok || !ref_tensor_is_valid(tensor, num_tokens.value_or(tensor.shape[0])))
      throw ArgumentError("tensor: must be one of a valid ref, got " +
                          py::repr(from).cast<std::string>());
    expect_within(tensor, buffer_->nbytes());
    return tensor;
  }

  // Of its codes, if it is encoded.
  py::object values(const RefTensor& tensor) const {
    const auto dtype =
        tensor.encoded() ? dlpack::kByte : kDtypes[static_cast<size_t>(tensor.dtype)];
    return view(tensor.offset, dtype, {tensor.rank, {tensor.shape[0], tensor.shape[1]}});
  }

  py::object scales(const RefTensor& tensor) const {
    return view(tensor.scales_offset, kFloat, {2, {tensor.shape[0], tensor.num_scales}});
  }

 private:
  py::object view(int64_t offset, dlpack::DataType dtype, const dlpack::Shape& shape) const {
    return from_dlpack_(
        dlpack::view(buffer_->data() + offset, dtype, shape, {dlpack::kCpu, 0}, buffer_));
  }

  Taker taker_;
  std::shared_ptr<Buffer> buffer_;
  py::handle from_dlpack_;
};

py::list views(const py::object& extent, const py::tuple& tensors, const py::object& from_dlpack) {
  Viewer viewer(extent, from_dlpack);
  py::list out;
  for (const py::handle from : tensors) {
    const RefTensor tensor = viewer.take(from, std::nullopt);
    out.append(viewer.values(tensor));
    if (tensor.encoded()) out.append(viewer.scales(tensor));
  }
  return out;
}

py::object encoded_feature(const Viewer& viewer, const RefTensor& tensor) {
  const py::object& dtypes = records().dtypes;
  Record out(records().encoded_feature);
  out.set(SF_NAME("codes"), viewer.values(tensor));
  out.set(SF_NAME("scales"), viewer.scales(tensor));
  out.set(SF_NAME("dtype"), py::object(dtypes[dtype_text(tensor.dtype)]));
  return out.take();
}

// What a Prompt checks when it is made is what a valid ref says of its tensors.
py::object stored_sample(const py::object& extent, const py::object& ref,
                         const py::object& from_dlpack) {
  const auto num_tokens = integer(ref.attr(SF_NAME("num_tokens")));
  Viewer viewer(extent, from_dlpack);
  Record prompt(records().prompt);
  py::dict features;
  int num_prompt_tensors = 0;
  for (const py::handle from : py::tuple(ref.attr(SF_NAME("tensors")))) {
    const RefTensor tensor = viewer.take(from, num_tokens.value_or(-1));
    const py::object name = from.attr(SF_NAME("name"));
    if (tensor.name == "input_ids" || tensor.name == "loss_mask") {
      prompt.set(name, viewer.values(tensor));
      ++num_prompt_tensors;
    } else {
      features[name] = tensor.encoded() ? encoded_feature(viewer, tensor) : viewer.values(tensor);
    }
  }
  if (num_prompt_tensors != 2)
    throw ArgumentError("tensors: must have input_ids and loss_mask once, got " +
                        std::to_string(num_prompt_tensors) + " of them");
  prompt.set(SF_NAME("sample_id"), py::object(ref.attr(SF_NAME("sample_id"))));
  Record out(records().stored_sample);
  out.set(SF_NAME("prompt"), prompt.take());
  out.set(SF_NAME("features"), py::object(std::move(features)));
  return out.take();
}

#undef SF_NAME

}  // namespace

void bind_ref(py::module_& m) {
  m.def("ref_is_valid", &is_valid, py::arg("ref"),
        "False also for texts that are not ASCII, and for values of subclasses of int, str and "
        "tuple. AttributeError for no ref.");
  m.def("ref_to_bytes", &to_bytes, py::arg("ref"), "None where ref_is_valid says False.");
  m.def("ref_from_bytes", &from_bytes, py::arg("data"),
        "A SampleRef; None for other bytes than ref_to_bytes makes.");
  m.def("tensor_views", &views, py::arg("extent"), py::arg("tensors"), py::arg("from_dlpack"),
        "Of a buffer, a tensor for each of a ref's; for an encoded one two, its codes and its "
        "scales. Each keeps the buffer. ValueError for what does not lie within it.");
  m.def("stored_sample", &stored_sample, py::arg("extent"), py::arg("ref"), py::arg("from_dlpack"),
        "A StoredSample of such views. ValueError as above, and for tensors of no valid ref.");
}

}  // namespace sf
