// The module specforge_ext._C: converts, releases the GIL, calls. No logic lives here.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "core/error.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native kernels and transport of specforge_ext. Use specforge_ext.ops and .store instead.";
  m.attr("__version__") = SF_VERSION;
  m.attr("__commit__") = SF_COMMIT;
#ifdef SF_CUDA
  m.attr("cuda_compiled") = true;
#else
  m.attr("cuda_compiled") = false;
#endif
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const sf::ArgumentError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    }
  });
  sf::bind_ops(m);
  sf::bind_transport(m);
  sf::bind_device_arena(m);
  sf::bind_wire(m);
  sf::bind_ref(m);
  sf::bind_views(m);
}
