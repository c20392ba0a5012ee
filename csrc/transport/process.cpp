#include "transport/process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "core/error.h"
#include "transport/file_descriptor.h"

namespace sf {
namespace {

struct Stat {
  char state;
  uint64_t start;
};

// "self" is right also where /proc shows another pid namespace than the caller's.
// Fields 3 (state) and 22 (starttime) of /proc/PID/stat, proc(5). The name in field 2 may hold
// blanks and brackets, so counting starts behind its last bracket.
std::optional<Stat> read_stat(const std::string& process) {
  const std::string path = "/proc/" + process + "/stat";
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

FileDescriptor open_process(pid_t pid) {
#ifdef SYS_pidfd_open
  return FileDescriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
#else
  static_cast<void>(pid);
  errno = ENOSYS;
  return FileDescriptor();
#endif
}

FileDescriptor open_own_process() {
  FileDescriptor fd = open_process(::getpid());
  if (!fd) throw MachineError("pidfd_open", std::strerror(errno), __FILE__, __LINE__);
  return fd;
}

bool process_ended(const FileDescriptor& pidfd) {
  pollfd ended{pidfd.get(), POLLIN, 0};
  return ::poll(&ended, 1, 0) == 1;
}

uint64_t own_start() {
  const auto stat = read_stat("self");
  if (!stat) throw MachineError("read /proc/self/stat", "no start time", __FILE__, __LINE__);
  return stat->start;
}

bool process_alive(pid_t pid, uint64_t start) {
  const FileDescriptor fd = open_process(pid);
  if (!fd && errno == ESRCH) return false;
  if (fd && process_ended(fd)) return false;
  const auto stat = read_stat(std::to_string(pid));
  if (!stat || static_cast<uint32_t>(stat->start) != static_cast<uint32_t>(start)) return false;
  if (fd) return true;
  // No pidfd here (an old kernel or a seccomp filter): the leader's state is all there is.
  return stat->state != 'Z' && stat->state != 'X';
}

}  // namespace sf
