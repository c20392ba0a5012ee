// One function per family of bindings; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

namespace sf {

class Producer;

void bind_ops(pybind11::module_& m);           // kernels: loss, pack (bind_ops.cpp)
void bind_transport(pybind11::module_& m);     // arena (bind_transport.cpp)
void bind_device_arena(pybind11::module_& m);  // arena on a GPU (bind_device_arena.cpp)
void bind_wire(pybind11::module_& m);          // checksums, encodings (bind_wire.cpp)
void bind_ref(pybind11::module_& m);           // refs' validity (bind_ref.cpp)

// An arena's stats(), whatever memory its payload is in.
pybind11::typing::Dict<pybind11::str, pybind11::int_> arena_stats(Producer& producer);

}  // namespace sf
