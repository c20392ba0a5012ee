// Large buffers that are written once, in fewer page faults.
#pragma once

#include "core/tensor_view.h"

namespace sf {

// Asks the system to back the tensor's memory with huge pages (Linux: MADV_HUGEPAGE on the whole
// pages within). Only advice: does nothing to the contents, on other devices, or where refused.
// Worth it for fresh buffers of megabytes: a fault then clears 2 MiB instead of 4 KiB.
void advise_huge_pages(const TensorView& view);

}  // namespace sf
