// How much memory this process may still take.
#pragma once

#include <cstdint>

namespace sf {

// The least of what the machine has available and what each enclosing cgroup (v1 or v2) has left,
// in bytes. MachineError if the kernel does not say.
//
// Asked before an arena is allocated: the memory of a memfd has no limit of its own, so that a size
// beyond the machine's would not fail but wake the OOM killer, which ends other processes first.
uint64_t available_memory();

}  // namespace sf
