#include <span>
#include <string>
#include <vector>

#include "bindings.h"
#include "convert.h"
#include "core/check.h"
#include "core/crc32c.h"
#include "wire/bytes_crc.h"
#include "wire/fp8_rows.h"

namespace py = pybind11;

namespace sf {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

std::vector<std::string> path_names() {
  std::vector<std::string> names;
  for (const Crc32cPath& path : crc32c_paths()) names.emplace_back(path.name);
  return names;
}

const Crc32cPath& path_named(const std::string& name) {
  std::string known;
  for (const Crc32cPath& path : crc32c_paths()) {
    if (name == path.name) return path;
    known += (known.empty() ? "" : ", ") + std::string(path.name);
  }
  throw ArgumentError("crc32c: path must be one of " + known + " on this CPU, got " + name);
}

uint32_t checksum_by(const std::string& path, const TensorView& data, uint32_t crc) {
  expect("crc32c", "data", data).contiguous().device({});
  return ~path_named(path).update(~crc, data.as<uint8_t>(), static_cast<size_t>(data.nbytes()));
}

uint32_t copy_by(const std::string& path, const TensorView& dst, const TensorView& src,
                 uint32_t crc, bool streams) {
  expect("copy_crc32c", "dst", dst).contiguous().device({});
  expect("copy_crc32c", "src", src).contiguous().device({});
  require(dst.nbytes() == src.nbytes(), "copy_crc32c", "dst must be of as many bytes as src",
          dst.nbytes());
  return ~path_named(path).copy(~crc, dst.as<uint8_t>(), src.as<uint8_t>(),
                                static_cast<size_t>(src.nbytes()), streams);
}

void bind_checksum_paths(py::module_& m) {
  m.def("crc32c_paths", &path_names, "For tests: the implementations this CPU can run.");
  m.def("crc32c_by", &checksum_by, py::arg("path"), py::arg("data"), py::arg("crc") = 0, NoGil());
  m.def("copy_crc32c_by", &copy_by, py::arg("path"), py::arg("dst"), py::arg("src"),
        py::arg("crc") = 0, py::arg("streams") = false, NoGil());
  m.def("crc32c_combine", &crc32c_combine, py::arg("crc_a"), py::arg("crc_b"), py::arg("nbytes_b"));
}

Stream stream_of(uintptr_t handle) { return {reinterpret_cast<void*>(handle)}; }

void bind_fp8(py::module_& m) {
  m.def(
      "fp8_pack",
      [](const TensorView& x, const TensorView& payload, const TensorView& scale,
         const TensorView& row_crc, const TensorView& summary, bool checksum, uintptr_t stream) {
        fp8_pack({x, payload, scale, row_crc, summary, checksum}, stream_of(stream));
      },
      py::arg("x"), py::arg("payload"), py::arg("scale"), py::arg("row_crc"), py::arg("summary"),
      py::arg("checksum"), py::arg("stream") = 0, NoGil());
  m.def(
      "fp8_unpack",
      [](const TensorView& payload, const TensorView& scale, const TensorView& y,
         const TensorView& row_crc, const TensorView& summary, bool checksum, uintptr_t stream) {
        fp8_unpack({payload, scale, y, row_crc, summary, checksum}, stream_of(stream));
      },
      py::arg("payload"), py::arg("scale"), py::arg("y"), py::arg("row_crc"), py::arg("summary"),
      py::arg("checksum"), py::arg("stream") = 0, NoGil());
  m.def(
      "bytes_crc",
      [](const TensorView& data, const TensorView& part_crc, const TensorView& crc,
         uintptr_t stream) { bytes_crc({data, part_crc, crc}, stream_of(stream)); },
      py::arg("data"), py::arg("part_crc"), py::arg("crc"), py::arg("stream") = 0, NoGil(),
      "part_crc: one for each 64 KiB that were begun.");
  m.def("fp8_encode", &fp8_encode, py::arg("x"), py::arg("q"), "For tests.", NoGil());
}

}  // namespace

void bind_wire(py::module_& m) {
  bind_checksum_paths(m);
  bind_fp8(m);
}

}  // namespace sf
