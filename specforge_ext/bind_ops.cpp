#include "bindings.h"

namespace sf {

void bind_ops(pybind11::module_&) {}

}  // namespace sf
