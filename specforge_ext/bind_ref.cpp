// SampleRefs between Python's records, plain data and bytes. store/ref.py says why a ref is
// refused, this says fast that it is not.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "bindings.h"
#include "ref_records.h"
#include "transport/sample_ref.h"

namespace sf {
namespace {

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

}  // namespace

void bind_ref(py::module_& m) {
  m.def("ref_is_valid", &is_valid, py::arg("ref"),
        "False also for texts beyond ASCII and values of subclasses. AttributeError for no ref.");
  m.def("ref_to_bytes", &to_bytes, py::arg("ref"), "None where ref_is_valid says False.");
  m.def("ref_from_bytes", &from_bytes, py::arg("data"),
        "A SampleRef; None for other bytes than ref_to_bytes makes.");
}

}  // namespace sf
