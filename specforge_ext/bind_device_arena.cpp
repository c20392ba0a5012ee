// The arena in the memory of a GPU for specforge_ext.store.cuda_ipc. Classes of their own: nothing
// here is a buffer, for the host must not look at a device's addresses.
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings.h"
#include "dlpack.h"
#include "transport/arena.h"

namespace py = pybind11;

namespace sf {
namespace {

// Whose slots and waits are those of the arena in bind_transport.cpp.
struct DeviceProducer {
  std::shared_ptr<Producer> arena;
  int device;
};

struct DeviceConsumer {
  std::shared_ptr<Consumer> arena;
  int device;
};

struct DeviceReservation {
  std::shared_ptr<Reservation> slot;
  int device;
};

struct DeviceLease {
  std::shared_ptr<Lease> slot;
  int device;
};

template <typename Held>
py::capsule bytes_of(const Held& self, int device_type) {
  // torch knows no read-only tensors: readers are asked not to write.
  void* const data = const_cast<std::byte*>(self.slot->data());
  const dlpack::Shape shape{1, {static_cast<int64_t>(self.slot->nbytes())}};
  return dlpack::view(data, dlpack::kByte, shape, {device_type, self.device}, self.slot);
}

DeviceReservation acquire(DeviceProducer& self, uint64_t nbytes, double timeout_s) {
  const py::gil_scoped_release unlocked;
  return {std::make_shared<Reservation>(self.arena->acquire(nbytes, timeout_s,
                                                            [] {
                                                              const py::gil_scoped_acquire locked;
                                                              if (PyErr_CheckSignals() != 0)
                                                                throw py::error_already_set();
                                                            })),
          self.device};
}

// The payload's bytes for network engines; the slots are in the host's memory.
py::typing::List<py::typing::Tuple<py::int_, py::int_>> regions(const DeviceProducer& self) {
  const Mapping& mapping = *self.arena->mapping();
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  py::typing::List<py::typing::Tuple<py::int_, py::int_>> out;
  out.append(py::make_tuple(address(&mapping.header()), mapping.fixed().control_bytes));
  out.append(py::make_tuple(address(mapping.payload()), mapping.fixed().payload_bytes));
  return out;
}

void bind_producer(py::module_& m) {
  py::class_<DeviceReservation>(m, "DeviceArenaReservation")
      .def_property_readonly("slot", [](const DeviceReservation& s) { return s.slot->ref().slot; })
      .def_property_readonly("generation",
                             [](const DeviceReservation& s) { return s.slot->ref().generation; })
      .def_property_readonly("nbytes", [](const DeviceReservation& s) { return s.slot->nbytes(); })
      .def_property_readonly("is_open", [](const DeviceReservation& s) { return s.slot->open(); })
      .def_property_readonly(
          "address",
          [](const DeviceReservation& s) { return reinterpret_cast<uintptr_t>(s.slot->data()); })
      .def("dlpack", &bytes_of<DeviceReservation>, py::arg("device_type") = dlpack::kCuda,
           "The bytes as a DLPack capsule. Drop what is made of it at `publish`.")
      .def(
          "publish", [](DeviceReservation& s) { s.slot->publish(); },
          "What was written must be complete: not queued on a stream.")
      .def("abort", [](DeviceReservation& s) { s.slot->abort(); });

  py::class_<DeviceProducer>(m, "DeviceArenaProducer")
      .def(py::init([](int device, uint64_t capacity_bytes, uint32_t max_slots,
                       double high_watermark, double low_watermark) {
             const py::gil_scoped_release unlocked;
             return DeviceProducer{Producer::create_on_device(device, capacity_bytes, max_slots,
                                                              {high_watermark, low_watermark}),
                                   device};
           }),
           py::arg("device"), py::arg("capacity_bytes"), py::arg("max_slots"), py::kw_only(),
           py::arg("high_watermark") = 1.0, py::arg("low_watermark") = 1.0,
           "Payload in the memory of the GPU of this ordinal. RuntimeError without driver or room.")
      .def_property_readonly(
          "epoch", [](const DeviceProducer& s) { return s.arena->mapping()->fixed().epoch; })
      .def_property_readonly("regions", &regions)
      .def("acquire", &acquire, py::arg("nbytes"), py::arg("timeout_s"),
           "A slot to write to. Waits without the GIL. StoreFull, TransferTimeout.")
      .def(
          "discard",
          [](DeviceProducer& s, uint32_t slot, uint64_t generation) {
            s.arena->discard({slot, generation});
          },
          py::arg("slot"), py::arg("generation"))
      .def(
          "serve",
          [](DeviceProducer& s, const std::string& path) {
            const py::gil_scoped_release unlocked;
            s.arena->serve(path);
            return SocketAddress{path, s.arena->mapping()->fixed().epoch}.text();
          },
          py::arg("path"), "Let readers in at a unix socket; its address for them.")
      .def(
          "reader",
          [](const DeviceProducer& s) {
            return DeviceConsumer{Consumer::join(s.arena->mapping()), s.device};
          },
          "One in this process, of the same addresses: no second mapping of the memory.")
      .def(
          "reap",
          [](DeviceProducer& s) {
            const py::gil_scoped_release unlocked;
            return s.arena->reap();
          },
          "Return the leases of ended readers; the number of those readers.")
      .def("stats", [](DeviceProducer& s) { return arena_stats(*s.arena); });
}

void bind_consumer(py::module_& m) {
  py::class_<DeviceLease>(m, "DeviceArenaLease")
      .def_property_readonly("nbytes", [](const DeviceLease& s) { return s.slot->nbytes(); })
      .def("dlpack", &bytes_of<DeviceLease>, py::arg("device_type") = dlpack::kCuda,
           "The bytes as a DLPack capsule, which keeps the lease.");

  py::class_<DeviceConsumer>(m, "DeviceArenaConsumer")
      .def(py::init([](int device, const std::string& address) {
             const py::gil_scoped_release unlocked;
             return DeviceConsumer{
                 Consumer::join(Mapping::attach_on_device(device, SocketAddress::parse(address))),
                 device};
           }),
           py::arg("device"), py::arg("address"),
           "shm:unix:PATH:EPOCH. ProducerLost, TransferTimeout, ValueError.")
      .def_property_readonly(
          "epoch", [](const DeviceConsumer& s) { return s.arena->mapping()->fixed().epoch; })
      .def_property_readonly("producer_alive",
                             [](const DeviceConsumer& s) { return s.arena->producer_alive(); })
      .def("reap", [](DeviceConsumer& s) { return s.arena->reap(); })
      .def(
          "lease",
          [](DeviceConsumer& s, uint32_t slot, uint64_t generation) {
            return DeviceLease{std::make_shared<Lease>(s.arena->lease({slot, generation})),
                               s.device};
          },
          py::arg("slot"), py::arg("generation"),
          "The slot's bytes, until the last view of the result is gone. StaleRef.")
      .def(
          "acknowledge",
          [](DeviceConsumer& s, uint32_t slot, uint64_t generation) {
            s.arena->acknowledge({slot, generation});
          },
          py::arg("slot"), py::arg("generation"));
}

}  // namespace

void bind_device_arena(py::module_& m) {
  bind_consumer(m);  // which signatures of the producer name
  bind_producer(m);
}

}  // namespace sf
