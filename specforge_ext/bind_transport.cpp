#include "bindings.h"

namespace sf {

void bind_transport(pybind11::module_&) {}

}  // namespace sf
