// The arena for specforge_ext.store.shm: buffers for pointers, Python's errors for ours.
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "bindings.h"
#include "core/crc32c.h"
#include "core/error.h"
#include "transport/arena.h"
#include "transport/errors.h"

namespace py = pybind11;

namespace sf {
namespace {

template <typename... Args>
void raise_store_error(const char* name, const Args&... args) {
  const py::object type = py::module_::import("specforge_ext.store.base").attr(name);
  const py::object error = type(args...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr p) {
  try {
    if (p) std::rethrow_exception(p);
  } catch (const StaleRef& e) {
    raise_store_error("StaleRef", e.what());
  } catch (const CorruptFeature& e) {
    raise_store_error("CorruptFeature", e.what());
  } catch (const ProducerLost& e) {
    raise_store_error("ProducerLost", e.what());
  } catch (const StoreFull& e) {
    raise_store_error("StoreFull", e.needed, e.available);
  } catch (const TransferTimeout& e) {
    raise_store_error("TransferTimeout", e.what_for, e.waited_s);
  } catch (const TransportError& e) {
    raise_store_error("StoreError", e.what());
  }
}

void expect_range(uint64_t offset, uint64_t nbytes, uint64_t available) {
  if (offset <= available && nbytes <= available - offset) return;
  throw ArgumentError("arena: range must lie within " + std::to_string(available) + " bytes, got " +
                      std::to_string(nbytes) + " at " + std::to_string(offset));
}

template <typename Extent>
uint32_t checksum(const Extent& self, uint64_t offset, uint64_t nbytes) {
  expect_range(offset, nbytes, self.nbytes());
  const py::gil_scoped_release unlocked;
  return crc32c(self.data() + offset, nbytes);
}

std::optional<uint32_t> write(Reservation& self, uint64_t offset, const py::buffer& source,
                              bool with_checksum) {
  const py::buffer_info info = source.request();
  const auto nbytes = static_cast<uint64_t>(info.size * info.itemsize);
  if (!self.open())
    throw ArgumentError("arena: reservation must be open, it was published or aborted");
  if (PyBuffer_IsContiguous(info.view(), 'C') == 0) {
    throw ArgumentError("arena: source must be contiguous");
  }
  expect_range(offset, nbytes, self.nbytes());
  const py::gil_scoped_release unlocked;
  if (with_checksum) return copy_crc32c(self.data() + offset, info.ptr, nbytes);
  copy_bytes(self.data() + offset, info.ptr, nbytes);
  return std::nullopt;
}

std::unique_ptr<Reservation> acquire(Producer& self, uint64_t nbytes, double timeout_s) {
  const py::gil_scoped_release unlocked;
  return std::make_unique<Reservation>(self.acquire(nbytes, timeout_s, [] {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }));
}

py::buffer_info bytes_of(const std::byte* data, uint64_t nbytes) {
  // Never marked read-only, for torch knows no such tensors and warns. A write through a reader's
  // view faults, because the pages are.
  return py::buffer_info(const_cast<std::byte*>(data), 1, "B", static_cast<py::ssize_t>(nbytes));
}

uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

// Where an engine or a device registers: slots first, then the payload. (address, nbytes) each.
template <typename Side>
py::typing::List<py::typing::Tuple<py::int_, py::int_>> regions(const Side& self) {
  const Mapping& mapping = *self.mapping();
  py::typing::List<py::typing::Tuple<py::int_, py::int_>> out;
  out.append(py::make_tuple(address(&mapping.header()), mapping.fixed().control_bytes));
  out.append(py::make_tuple(address(mapping.payload()), mapping.fixed().payload_bytes));
  return out;
}

// The last view may be dropped by any thread.
void before_unmap(Consumer& self, py::typing::Callable<void()> call) {
  const std::shared_ptr<py::function> held(new py::function(std::move(call)),
                                           [](py::function* function) {
                                             const py::gil_scoped_acquire locked;
                                             delete function;
                                           });
  self.mapping()->before_unmap([held] {
    const py::gil_scoped_acquire locked;
    try {
      (*held)();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("specforge_ext arena, before it is unmapped");
    }
  });
}

void bind_producer(py::module_& m) {
  py::class_<Reservation>(m, "ArenaReservation", py::buffer_protocol())
      .def_buffer([](Reservation& self) { return bytes_of(self.data(), self.nbytes()); })
      .def_property_readonly("slot", [](const Reservation& self) { return self.ref().slot; })
      .def_property_readonly("generation",
                             [](const Reservation& self) { return self.ref().generation; })
      .def_property_readonly("nbytes", &Reservation::nbytes)
      .def_property_readonly("is_open", &Reservation::open)
      .def_property_readonly("address",
                             [](const Reservation& self) { return address(self.data()); })
      .def("write", &write, py::arg("offset"), py::arg("source"), py::arg("checksum"),
           "Copy contiguous bytes in; their crc32c if `checksum`. Runs without the GIL.")
      .def("crc32c", &checksum<Reservation>, py::arg("offset"), py::arg("nbytes"))
      .def("publish", &Reservation::publish)
      .def("abort", &Reservation::abort);

  py::class_<Producer, std::shared_ptr<Producer>>(m, "ArenaProducer")
      .def(py::init([](uint64_t capacity_bytes, uint32_t max_slots, double high_watermark,
                       double low_watermark) {
             const py::gil_scoped_release unlocked;
             return Producer::create(capacity_bytes, max_slots, {high_watermark, low_watermark});
           }),
           py::arg("capacity_bytes"), py::arg("max_slots"), py::kw_only(),
           py::arg("high_watermark") = 1.0, py::arg("low_watermark") = 1.0,
           "Stops admitting above the high mark, resumes at the low one (shares of the capacity).")
      .def_property_readonly("address",
                             [](const Producer& self) { return self.mapping()->address().text(); })
      .def_property_readonly("epoch",
                             [](const Producer& self) { return self.mapping()->fixed().epoch; })
      .def_property_readonly("regions", &regions<Producer>,
                             "(address, nbytes) of the slots' pages and of the payload.")
      .def("acquire", &acquire, py::arg("nbytes"), py::arg("timeout_s"),
           "A writable slot. Waits without the GIL. StoreFull, TransferTimeout.")
      .def(
          "discard",
          [](Producer& self, uint32_t slot, uint64_t generation) {
            self.discard({slot, generation});
          },
          py::arg("slot"), py::arg("generation"))
      .def(
          "serve",
          [](Producer& self, const std::string& path) {
            const py::gil_scoped_release unlocked;
            self.serve(path);
            return SocketAddress{path, self.mapping()->fixed().epoch}.text();
          },
          py::arg("path"), "Let readers in at a unix socket as well; its address for them.")
      .def("reap", &Producer::reap, py::call_guard<py::gil_scoped_release>(),
           "Return the leases of ended readers; the number of those readers.")
      .def("stats", &arena_stats);
}

void bind_consumer(py::module_& m) {
  py::class_<Lease>(m, "ArenaLease", py::buffer_protocol())
      .def_buffer([](Lease& self) { return bytes_of(self.data(), self.nbytes()); })
      .def_property_readonly("nbytes", &Lease::nbytes)
      .def("crc32c", &checksum<Lease>, py::arg("offset"), py::arg("nbytes"));

  py::class_<Consumer, std::shared_ptr<Consumer>>(m, "ArenaConsumer")
      .def(py::init([](const std::string& address) {
             const py::gil_scoped_release unlocked;
             return Consumer::join(Mapping::attach(address));
           }),
           py::arg("address"),
           "shm:PID:... or shm:unix:... ProducerLost, TransferTimeout, ValueError.")
      .def_property_readonly("epoch",
                             [](const Consumer& self) { return self.mapping()->fixed().epoch; })
      .def_property_readonly("producer_alive", &Consumer::producer_alive)
      .def_property_readonly("regions", &regions<Consumer>,
                             "(address, nbytes) of the slots' pages and of the payload.")
      .def("before_unmap", &before_unmap, py::arg("call"),
           "Called once, when the last lease and this reader are gone.")
      .def("reap", &Consumer::reap, py::call_guard<py::gil_scoped_release>(),
           "Free the slots an ended producer was writing; how many they were.")
      .def(
          "lease",
          [](Consumer& self, uint32_t slot, uint64_t generation) {
            return std::make_unique<Lease>(self.lease({slot, generation}));
          },
          py::arg("slot"), py::arg("generation"),
          "The slot's bytes, until the last buffer of the result is gone. StaleRef.")
      .def("open", &open_sample, py::arg("ref"), py::arg("store"), py::arg("layout_hash"),
           py::arg("from_dlpack"), "A leased StoredSample; None for a ref of another. StaleRef.")
      .def(
          "acknowledge",
          [](Consumer& self, uint32_t slot, uint64_t generation) {
            self.acknowledge({slot, generation});
          },
          py::arg("slot"), py::arg("generation"));
}

}  // namespace

py::typing::Dict<py::str, py::int_> arena_stats(Producer& self) {
  const ArenaStats now = self.stats();
  const auto count = [&](SlotState state) { return now.slots[static_cast<uint8_t>(state)]; };
  py::typing::Dict<py::str, py::int_> out;
  out["capacity_bytes"] = now.capacity_bytes;
  out["used_bytes"] = now.used_bytes;
  out["largest_free_bytes"] = now.largest_free_bytes;
  out["slots_free"] = count(SlotState::kFree);
  out["slots_writing"] = count(SlotState::kWriting);
  out["slots_ready"] = count(SlotState::kReady);
  out["slots_leased"] = count(SlotState::kLeased);
  out["slots_draining"] = count(SlotState::kDraining);
  out["num_readers"] = now.num_consumers;
  return out;
}

void bind_transport(py::module_& m) {
  py::register_exception_translator(&translate);
  bind_producer(m);
  bind_consumer(m);
}

}  // namespace sf
