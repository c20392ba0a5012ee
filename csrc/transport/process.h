// Who a process is, and whether it still runs. A pid alone is reused; with its start time it is
// not.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace sf {

// Clock ticks between boot and the start of the process; nothing if there is no such process.
std::optional<uint64_t> process_start(pid_t pid);

// Of the calling process.
uint64_t own_start();

// False once the whole process has ended, zombies included. Only the low 32 bits of `start` count.
bool process_alive(pid_t pid, uint64_t start);

}  // namespace sf
