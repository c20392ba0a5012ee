// Who a process is, and whether it still runs. A pid alone is reused; with its start time it is
// not.
#pragma once

#include <sys/types.h>

#include <cstdint>

#include "transport/file_descriptor.h"

namespace sf {

// A pidfd: readable once the whole process has ended, by whoever holds it, in any pid namespace.
// None if there is no such process, or the kernel or a seccomp filter knows no pidfds.
FileDescriptor open_process(pid_t pid);

// Of the calling process. MachineError if pidfds are not to be had.
FileDescriptor open_own_process();

// Zombies have ended too.
bool process_ended(const FileDescriptor& pidfd);

// Clock ticks between boot and the start of the calling process.
uint64_t own_start();

// False once the whole process has ended, zombies included. Only the low 32 bits of `start` count.
bool process_alive(pid_t pid, uint64_t start);

}  // namespace sf
