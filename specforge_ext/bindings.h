// One function per family of bindings; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace sf {

void bind_ops(pybind11::module_& m);        // kernels: loss, pack (bind_ops.cpp)
void bind_transport(pybind11::module_& m);  // arena (bind_transport.cpp)
void bind_wire(pybind11::module_& m);       // checksums, encodings (bind_wire.cpp)

}  // namespace sf
