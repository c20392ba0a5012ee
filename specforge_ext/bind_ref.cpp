// Whether a SampleRef can be true of a store: store/ref.py says why not, this says it fast.
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace sf {
namespace {

// As in store/ref.py; tests/test_store_ref_native.py compares.
constexpr int64_t kMaxSize = INT64_MAX;
constexpr int64_t kMaxDim = INT32_MAX;
constexpr int64_t kMaxU32 = UINT32_MAX;
constexpr int64_t kMaxGeneration = (int64_t{1} << 40) - 1;
constexpr int64_t kAlignBytes = 64;
constexpr Py_ssize_t kMaxTensors = 256;

struct Dtype {
  std::string_view name;
  int64_t itemsize;
  bool encodes;  // with fp8_e4m3_row
};
constexpr std::array<Dtype, 6> kDtypes = {{{"float32", 4, true},
                                           {"bfloat16", 2, true},
                                           {"float16", 2, true},
                                           {"int64", 8, false},
                                           {"int32", 4, false},
                                           {"uint8", 1, false}}};

struct Range {
  int64_t offset;
  int64_t nbytes;
  bool operator<(const Range& other) const {
    return std::pair(offset, nbytes) < std::pair(other.offset, other.nbytes);
  }
};

// Attributes by name, each name made once.
#define SF_NAME(name)                                               \
  [] {                                                              \
    static const py::handle held(PyUnicode_InternFromString(name)); \
    return held;                                                    \
  }()

std::optional<int64_t> integer(const py::object& value, int64_t low, int64_t high) {
  if (!PyLong_CheckExact(value.ptr())) return std::nullopt;
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  if (overflow != 0 || number < low || number > high) return std::nullopt;
  return number;
}

// Only if it is ASCII: what is not has other views than its characters.
std::optional<std::string_view> ascii(const py::object& value) {
  if (!PyUnicode_CheckExact(value.ptr()) || !PyUnicode_IS_ASCII(value.ptr())) return std::nullopt;
  return std::string_view(static_cast<const char*>(PyUnicode_DATA(value.ptr())),
                          static_cast<size_t>(PyUnicode_GET_LENGTH(value.ptr())));
}

bool is_text(const py::object& value, Py_ssize_t max_chars) {
  if (!PyUnicode_CheckExact(value.ptr())) return false;
  const Py_ssize_t num_chars = PyUnicode_GET_LENGTH(value.ptr());
  if (num_chars == 0 || num_chars > max_chars) return false;
  if (const auto text = ascii(value))
    return std::all_of(text->begin(), text->end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  return value.attr("isprintable")().cast<bool>();
}

bool is_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_'; }

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= 128 && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return is_letter(c) || (c >= '0' && c <= '9') || c == '.' || c == '-';
         });
}

const Dtype* dtype_named(const py::object& value) {
  const auto text = ascii(value);
  if (!text) return nullptr;
  const auto* const found = std::find_if(kDtypes.begin(), kDtypes.end(),
                                         [&](const Dtype& dtype) { return dtype.name == *text; });
  return found == kDtypes.end() ? nullptr : found;
}

std::optional<int64_t> offset_of(const py::object& value) {
  const auto offset = integer(value, 0, kMaxSize);
  return offset && *offset % kAlignBytes == 0 ? offset : std::nullopt;
}

struct Shape {
  int64_t rows;
  int64_t width;  // 1 of a prompt's tensor, which has none
};

std::optional<Shape> shape_of(const py::object& value, Py_ssize_t rank, int64_t num_tokens) {
  if (!PyTuple_CheckExact(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != rank)
    return std::nullopt;
  const auto size = [&](Py_ssize_t i) {
    return integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(value.ptr(), i)), 0,
                   kMaxDim);
  };
  const auto rows = size(0);
  const auto width = rank == 2 ? size(1) : int64_t{1};
  if (!rows || !width || *rows != num_tokens) return std::nullopt;
  return Shape{*rows, *width};
}

// What a sample's tensors have told so far. The names are of objects that `held` keeps.
struct Seen {
  std::vector<std::string_view> names;
  std::vector<Range> ranges;
  std::vector<py::object> held;
};

bool take_scales(const py::object& tensor, const Dtype& dtype, const Shape& shape, Seen* seen) {
  if (!dtype.encodes || shape.width == 0) return false;
  const auto num_scales = integer(tensor.attr(SF_NAME("num_scales")), 1, shape.width);
  const auto offset = offset_of(tensor.attr(SF_NAME("scales_offset")));
  int64_t nbytes = 0;
  if (!num_scales || !offset || shape.width % *num_scales != 0 ||
      __builtin_mul_overflow(4 * *num_scales, shape.rows, &nbytes))
    return false;
  seen->ranges.push_back({*offset, nbytes});
  return true;
}

bool take_tensor(const py::object& tensor, int64_t num_tokens, Seen* seen) {
  seen->held.push_back(tensor.attr(SF_NAME("name")));
  const auto name = ascii(seen->held.back());
  if (!name || !is_name(*name)) return false;
  const Dtype* const dtype = dtype_named(tensor.attr(SF_NAME("dtype")));
  if (dtype == nullptr) return false;
  const bool is_ids = *name == "input_ids";
  const bool is_mask = *name == "loss_mask";
  if ((is_ids && dtype->name != "int32") || (is_mask && dtype->name != "uint8")) return false;
  const py::object encoding_held = tensor.attr(SF_NAME("encoding"));
  const auto encoding = ascii(encoding_held);
  const bool encoded = encoding == "fp8_e4m3_row";
  if (!encoded && encoding != "none") return false;
  const py::object checksum = tensor.attr(SF_NAME("checksum"));
  if (!checksum.is_none() && !integer(checksum, 0, kMaxU32)) return false;
  const auto shape = shape_of(tensor.attr(SF_NAME("shape")), is_ids || is_mask ? 1 : 2, num_tokens);
  const auto offset = offset_of(tensor.attr(SF_NAME("offset")));
  const auto nbytes = integer(tensor.attr(SF_NAME("nbytes")), 0, kMaxSize);
  int64_t wanted = 0;
  if (!shape || !offset || !nbytes ||
      __builtin_mul_overflow(shape->rows * shape->width, encoded ? 1 : dtype->itemsize, &wanted) ||
      *nbytes != wanted)
    return false;
  seen->names.push_back(*name);
  seen->ranges.push_back({*offset, *nbytes});
  if (encoded) return take_scales(tensor, *dtype, *shape, seen);
  return integer(tensor.attr(SF_NAME("num_scales")), 0, 0) &&
         integer(tensor.attr(SF_NAME("scales_offset")), 0, 0);
}

bool names_fit(std::vector<std::string_view>* names) {
  std::sort(names->begin(), names->end());
  return std::adjacent_find(names->begin(), names->end()) == names->end() &&
         std::binary_search(names->begin(), names->end(), "input_ids") &&
         std::binary_search(names->begin(), names->end(), "loss_mask");
}

bool ranges_fit(std::vector<Range>* ranges, int64_t available) {
  std::sort(ranges->begin(), ranges->end());
  int64_t end = 0;
  for (const Range& range : *ranges) {
    if (range.offset < end || range.offset > available || range.nbytes > available - range.offset)
      return false;
    end = range.offset + range.nbytes;
  }
  return true;
}

bool ref_is_valid(const py::object& ref) {
  if (!is_text(ref.attr(SF_NAME("sample_id")), 512) || !is_text(ref.attr(SF_NAME("store")), 128) ||
      !is_text(ref.attr(SF_NAME("layout_hash")), 64) ||
      !integer(ref.attr(SF_NAME("slot")), 0, kMaxU32) ||
      !integer(ref.attr(SF_NAME("generation")), 1, kMaxGeneration))
    return false;
  const auto num_tokens = integer(ref.attr(SF_NAME("num_tokens")), 0, kMaxDim);
  const auto nbytes = integer(ref.attr(SF_NAME("nbytes")), 0, kMaxSize);
  const py::object tensors = ref.attr(SF_NAME("tensors"));
  if (!num_tokens || !nbytes || !PyTuple_CheckExact(tensors.ptr()) ||
      PyTuple_GET_SIZE(tensors.ptr()) > kMaxTensors)
    return false;
  Seen seen;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
    const auto tensor = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(tensors.ptr(), i));
    if (!take_tensor(tensor, *num_tokens, &seen)) return false;
  }
  return names_fit(&seen.names) && ranges_fit(&seen.ranges, *nbytes);
}

#undef SF_NAME

}  // namespace

void bind_ref(py::module_& m) {
  m.def("ref_is_valid", &ref_is_valid, py::arg("ref"),
        "False also for values of subclasses of int, str and tuple. AttributeError for no ref.");
}

}  // namespace sf
