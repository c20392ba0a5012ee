// One function per family of bindings; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <string_view>

namespace sf {

class Consumer;
class Producer;

void bind_ops(pybind11::module_& m);           // kernels: loss, pack (bind_ops.cpp)
void bind_transport(pybind11::module_& m);     // arena (bind_transport.cpp)
void bind_device_arena(pybind11::module_& m);  // arena on a GPU (bind_device_arena.cpp)
void bind_wire(pybind11::module_& m);          // checksums, encodings (bind_wire.cpp)
void bind_ref(pybind11::module_& m);           // refs' validity and bytes (bind_ref.cpp)
void bind_views(pybind11::module_& m);         // samples as views of memory (bind_views.cpp)

// An arena's stats(), whatever memory its payload is in.
pybind11::typing::Dict<pybind11::str, pybind11::int_> arena_stats(Producer& producer);

// A StoredSample of views that lease the sample: all of a reader's `open` but for checksums. None
// where a ref is not valid, not of this store and layout, or not of the slot's size: the caller
// says what is wrong.
pybind11::object open_sample(Consumer& consumer, const pybind11::object& ref,
                             std::string_view store, std::string_view layout_hash,
                             const pybind11::object& from_dlpack);

}  // namespace sf
