#include "transport/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"
#include "transport/file_descriptor.h"

namespace sf {
namespace {

struct Stat {
  char state;
  uint64_t start;
};

// Fields 3 (state) and 22 (starttime) of /proc/PID/stat, proc(5). The name in field 2 may hold
// blanks and brackets, so counting starts behind its last bracket.
std::optional<Stat> read_stat(pid_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  const FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return std::nullopt;
  char text[1024];
  const ssize_t n = ::read(fd.get(), text, sizeof text - 1);
  if (n <= 0) return std::nullopt;
  text[n] = 0;
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] != ' ') return std::nullopt;
  field += 2;
  const char state = *field;
  for (int i = 3; i < 22; ++i) {
    field = std::strchr(field, ' ');
    if (field == nullptr) return std::nullopt;
    ++field;
  }
  return Stat{state, std::strtoull(field, nullptr, 10)};
}

}  // namespace

std::optional<uint64_t> process_start(pid_t pid) {
  const auto stat = read_stat(pid);
  if (!stat) return std::nullopt;
  return stat->start;
}

uint64_t own_start() {
  const auto start = process_start(::getpid());
  if (!start) throw MachineError("read /proc/self/stat", "no start time", __FILE__, __LINE__);
  return *start;
}

bool process_alive(pid_t pid, uint64_t start) {
#ifdef SYS_pidfd_open
  const FileDescriptor fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!fd && errno == ESRCH) return false;
  if (fd) {
    // Readable once the last thread has ended, before and after anybody waits for the process.
    pollfd ended{fd.get(), POLLIN, 0};
    if (::poll(&ended, 1, 0) == 1) return false;
  }
#endif
  const auto stat = read_stat(pid);
  if (!stat || static_cast<uint32_t>(stat->start) != static_cast<uint32_t>(start)) return false;
#ifdef SYS_pidfd_open
  if (fd) return true;
#endif
  // No pidfd here (an old kernel or a seccomp filter): the leader's state is all there is.
  return stat->state != 'Z' && stat->state != 'X';
}

}  // namespace sf
