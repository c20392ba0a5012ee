// Python's records of refs and samples, read and made without their constructors.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "transport/sample_ref.h"

namespace sf {

namespace py = pybind11;

// Names of attributes, each made once.
#define SF_NAME(name)                                               \
  [] {                                                              \
    static const py::handle held(PyUnicode_InternFromString(name)); \
    return held;                                                    \
  }()

inline std::optional<int64_t> integer(py::handle value) {
  if (!PyLong_CheckExact(value.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0) return std::nullopt;
  return number;
}

inline std::optional<std::string_view> ascii(py::handle value) {
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

inline py::object text(std::string_view ascii) {
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

inline py::handle dtype_text(int dtype) {
  static const auto texts = [] {
    std::array<std::string_view, kRefDtypes.size()> names;
    for (size_t i = 0; i < names.size(); ++i) names[i] = kRefDtypes[i].name;
    return texts_of(names);
  }();
  return texts[static_cast<size_t>(dtype)];
}

inline py::handle encoding_text(int encoding) {
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

inline const Records& records() {
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

}  // namespace sf
