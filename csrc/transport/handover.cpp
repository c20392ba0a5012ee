#include "transport/handover.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "transport/errors.h"
#include "transport/process.h"

namespace sf {
namespace {

constexpr uint64_t kMagic = 0x31524f4f44414653;  // "SFADOOR1"
constexpr int kHelloMs = 1000;
constexpr int kReplyS = 10;

struct Hello {
  uint64_t magic;
};

struct Reply {
  uint64_t magic;
  uint64_t epoch;
  uint64_t identity;
};

[[noreturn]] void fail(const std::string& call, int error, int line) {
  throw MachineError(call, std::strerror(error), __FILE__, line);
}

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path ||
      path.find('\0') != std::string::npos) {
    throw ArgumentError("arena: path of a socket must have 1.." +
                        std::to_string(sizeof address.sun_path - 1) + " bytes, got " +
                        std::to_string(path.size()));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

FileDescriptor open_socket(int flags = 0) {
  FileDescriptor fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0));
  if (!fd) fail("socket", errno, __LINE__);
  return fd;
}

int connect_to(const FileDescriptor& fd, const sockaddr_un& address) {
  const auto* raw = reinterpret_cast<const sockaddr*>(&address);
  return ::connect(fd.get(), raw, sizeof address) == 0 ? 0 : errno;
}

// Whoever may enter the directory could put another socket in the place of ours.
void expect_private_directory(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  struct stat info;
  if (::stat(directory.c_str(), &info) != 0) fail("stat " + directory, errno, __LINE__);
  if (info.st_uid == ::geteuid() && (info.st_mode & 0077) == 0) return;
  char mode[8];
  std::snprintf(mode, sizeof mode, "%04o", info.st_mode & 07777);
  throw ArgumentError("arena: directory " + directory + " of a socket must be 0700 and of user " +
                      std::to_string(::geteuid()) + ", got " + mode + " of user " +
                      std::to_string(info.st_uid));
}

void remove_stale(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return;
  const bool stale =
      S_ISSOCK(info.st_mode) && connect_to(open_socket(SOCK_NONBLOCK), address) == ECONNREFUSED;
  if (!stale) {
    throw ArgumentError("arena: " + path + " must be free for a socket, got one in use or a file");
  }
  if (::unlink(path.c_str()) != 0) fail("unlink " + path, errno, __LINE__);
}

ucred peer_of(const FileDescriptor& connection) {
  ucred peer{};
  socklen_t size = sizeof peer;
  if (::getsockopt(connection.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    fail("getsockopt(SO_PEERCRED)", errno, __LINE__);
  }
  return peer;
}

template <size_t N>
union Control {
  cmsghdr aligned;
  char bytes[CMSG_SPACE(N * sizeof(int))];
};

template <typename Message, size_t N>
bool send_with(const FileDescriptor& to, Message message, const std::array<int, N>& fds) {
  iovec part{&message, sizeof message};
  Control<N> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.bytes;
  header.msg_controllen = sizeof control.bytes;
  cmsghdr* c = CMSG_FIRSTHDR(&header);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof fds);
  std::memcpy(CMSG_DATA(c), fds.data(), sizeof fds);
  ssize_t n;
  do {
    n = ::sendmsg(to.get(), &header, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  return n == static_cast<ssize_t>(sizeof message);
}

// How many bytes came, as recvmsg(2). Descriptors that came are owned; the others are -1.
template <typename Message, size_t N>
ssize_t receive_with(const FileDescriptor& from, Message& message,
                     std::array<FileDescriptor, N>& fds) {
  iovec part{&message, sizeof message};
  Control<N> control{};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.bytes;
  header.msg_controllen = sizeof control.bytes;
  ssize_t n;
  do {
    n = ::recvmsg(from.get(), &header, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return n;
  // No more than N fit into `control`: the kernel closes what does not fit.
  const cmsghdr* c = CMSG_FIRSTHDR(&header);
  if (c == nullptr || c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) return n;
  const size_t num_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (size_t i = 0; i < num_fds; ++i) {
    int fd;
    std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
    FileDescriptor owned(fd);
    if (i < N) fds[i] = std::move(owned);
  }
  return n;
}

FileDescriptor connect_in_time(const std::string& path) {
  FileDescriptor connection = open_socket();
  const timeval limit{kReplyS, 0};
  ::setsockopt(connection.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(connection.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  const int error = connect_to(connection, address_of(path));
  if (error == ENOENT || error == ECONNREFUSED) {
    throw ProducerLost("arena at " + path + ": nobody listens, its producer has ended or closed");
  }
  if (error == EAGAIN) throw TransferTimeout("the producer at " + path + " to listen", kReplyS);
  if (error != 0) fail("connect " + path, error, __LINE__);
  return connection;
}

}  // namespace

FileDescriptor listen_at(const std::string& path) {
  const sockaddr_un address = address_of(path);
  expect_private_directory(path);
  remove_stale(path, address);
  FileDescriptor listener = open_socket(SOCK_NONBLOCK);
  if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    fail("bind " + path, errno, __LINE__);
  }
  // Nobody connects before listen(), so that the mode is never wider for anybody.
  if (::chmod(path.c_str(), 0600) != 0) fail("chmod " + path, errno, __LINE__);
  if (::listen(listener.get(), 64) != 0) fail("listen " + path, errno, __LINE__);
  return listener;
}

std::optional<Guest> meet(const FileDescriptor& listener) {
  FileDescriptor connection(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!connection) {
    // Out of descriptors, say: it keeps knocking, and looking again at once would be a busy loop.
    if (errno != EAGAIN && errno != ECONNABORTED) ::poll(nullptr, 0, 100);
    return std::nullopt;
  }
  const ucred peer = peer_of(connection);
  if (peer.uid != ::geteuid()) return std::nullopt;  // knock() tells its user why
  pollfd said{connection.get(), POLLIN, 0};
  if (::poll(&said, 1, kHelloMs) != 1) return std::nullopt;
  Hello hello{};
  std::array<FileDescriptor, 1> process;
  const ssize_t n = receive_with(connection, hello, process);
  if (n != static_cast<ssize_t>(sizeof hello) || hello.magic != kMagic || !process[0]) {
    return std::nullopt;
  }
  return Guest{std::move(connection), std::move(process[0])};
}

bool welcome(const Guest& guest, const Arena& arena, uint64_t identity) {
  const Reply reply{kMagic, arena.epoch, identity};
  if (arena.payload < 0) {
    return send_with(guest.connection, reply, std::array{arena.memory, arena.process});
  }
  return send_with(guest.connection, reply, std::array{arena.memory, arena.process, arena.payload});
}

Handover knock(const std::string& path) {
  FileDescriptor connection = connect_in_time(path);
  const ucred peer = peer_of(connection);
  if (peer.uid != ::geteuid()) {
    throw ArgumentError("arena: " + path + " must belong to user " + std::to_string(::geteuid()) +
                        ", got user " + std::to_string(peer.uid));
  }
  const FileDescriptor self = open_own_process();
  send_with(connection, Hello{kMagic}, std::array<int, 1>{self.get()});
  Reply reply{};
  std::array<FileDescriptor, 3> fds;
  ssize_t n = receive_with(connection, reply, fds);
  // It hung up without hearing us out. That comes first, what it said is still to be read.
  if (n < 0 && errno == ECONNRESET) n = receive_with(connection, reply, fds);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    throw TransferTimeout("the producer at " + path + " to answer", kReplyS);
  }
  if (n <= 0) throw ProducerLost("arena at " + path + ": its producer hung up");
  if (n != static_cast<ssize_t>(sizeof reply) || reply.magic != kMagic || !fds[0] || !fds[1]) {
    throw ArgumentError("arena: " + path + " must be the socket of an arena, got another answer");
  }
  return {std::move(connection), std::move(fds[0]), std::move(fds[1]),
          std::move(fds[2]),     reply.epoch,       reply.identity};
}

}  // namespace sf
