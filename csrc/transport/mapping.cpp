#include "transport/mapping.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

#include "core/error.h"
#include "transport/errors.h"
#include "transport/handover.h"
#include "transport/memory.h"
#include "transport/process.h"

namespace sf {
namespace {

[[noreturn]] void fail(const std::string& call, int error, int line) {
  throw MachineError(call, std::strerror(error), __FILE__, line);
}

uint64_t random_epoch() {
  uint64_t epoch = 0;
  while (epoch == 0) {
    if (::getrandom(&epoch, sizeof epoch, 0) != sizeof epoch) fail("getrandom", errno, __LINE__);
  }
  return epoch;
}

// An eighth is left to everybody else.
void expect_memory(uint64_t nbytes) {
  const uint64_t available = available_memory();
  if (nbytes <= available / 8 * 7) return;
  throw MachineError(
      "arena: allocate " + std::to_string(nbytes) + " bytes",
      "only " + std::to_string(available) + " are available, of which it may take 7/8", __FILE__,
      __LINE__);
}

void check_file(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) fail("fstat " + path, errno, __LINE__);
  if (info.st_uid != ::geteuid()) {
    throw ArgumentError("arena: " + path + " must belong to user " + std::to_string(::geteuid()) +
                        ", got user " + std::to_string(info.st_uid));
  }
  // Without the seals its producer could truncate the file and every read here would be a SIGBUS.
  const int wanted = F_SEAL_SHRINK | F_SEAL_GROW;
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & wanted) != wanted) {
    throw ArgumentError("arena: " + path + " must be a memfd sealed against shrinking and growing");
  }
}

FixedHeader read_header(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) fail("fstat " + path, errno, __LINE__);
  FixedHeader header;
  const ssize_t n = ::pread(fd, &header, sizeof header, 0);
  if (n < 0) fail("pread " + path, errno, __LINE__);
  if (n != static_cast<ssize_t>(sizeof header)) {
    throw ArgumentError("arena: " + path + " must hold a header of " +
                        std::to_string(sizeof header) + " bytes, got " + std::to_string(n));
  }
  check_header(header, static_cast<uint64_t>(info.st_size));
  return header;
}

FileDescriptor open_memory(const ArenaAddress& address, const std::string& path) {
  if (!process_alive(address.pid, address.start)) {
    throw ProducerLost("arena " + address.text() + ": its producer, process " +
                       std::to_string(address.pid) + ", has ended");
  }
  FileDescriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd && errno == ENOENT) {
    throw ProducerLost("arena " + address.text() + ": its producer has ended or closed it");
  }
  if (!fd) fail("open " + path, errno, __LINE__);
  return fd;
}

FixedHeader check_arena(const FileDescriptor& fd, const std::string& path, uint64_t epoch,
                        const std::string& address, PayloadPlace place) {
  check_file(fd.get(), path);
  const FixedHeader fixed = read_header(fd.get(), path);
  if (fixed.epoch != epoch) {
    throw ProducerLost("arena " + address + ": its producer has closed it and opened another");
  }
  if (fixed.place == place) return fixed;
  const char* const on_device = "the memory of a GPU";
  const char* const in_file = "shared memory";
  const bool wanted_device = place == PayloadPlace::kDevice;
  throw ArgumentError("arena " + address + ": payload must lie in " +
                      (wanted_device ? on_device : in_file) + ", it is in " +
                      (wanted_device ? in_file : on_device));
}

uint64_t own_identity() { return (own_start() << 32) | static_cast<uint32_t>(::getpid()); }

constexpr std::string_view kSocketPrefix = "shm:unix:";

std::string epoch_text(uint64_t epoch) {
  char out[24];
  std::snprintf(out, sizeof out, ":%016llx", static_cast<unsigned long long>(epoch));
  return out;
}

}  // namespace

std::string SocketAddress::text() const {
  return std::string(kSocketPrefix) + path + epoch_text(epoch);
}

SocketAddress SocketAddress::parse(const std::string& text) {
  SocketAddress address{"", 0};
  const size_t colon = text.rfind(':');
  if (text.starts_with(kSocketPrefix) && colon > kSocketPrefix.size()) {
    address.path = text.substr(kSocketPrefix.size(), colon - kSocketPrefix.size());
    address.epoch = std::strtoull(text.c_str() + colon + 1, nullptr, 16);
  }
  // Writing it out again shows that nothing else was there.
  if (!address.path.empty() && address.epoch != 0 && address.text() == text) return address;
  throw ArgumentError("arena: address must be shm:unix:PATH:EPOCH, got '" + text.substr(0, 160) +
                      "'");
}

std::string ArenaAddress::text() const {
  char out[96];
  std::snprintf(out, sizeof out, "shm:%lld:%llu:%d:%016llx", static_cast<long long>(pid),
                static_cast<unsigned long long>(start), fd, static_cast<unsigned long long>(epoch));
  return out;
}

ArenaAddress ArenaAddress::parse(const std::string& text) {
  long long pid = 0;
  unsigned long long start = 0;
  unsigned long long epoch = 0;
  int fd = 0;
  // Widths keep every number within its type; writing it out again shows that nothing else was
  // there.
  const int fields =
      std::sscanf(text.c_str(), "shm:%9lld:%18llu:%9d:%16llx", &pid, &start, &fd, &epoch);
  const ArenaAddress address{static_cast<pid_t>(pid), start, fd, epoch};
  if (fields != 4 || pid <= 0 || fd < 0 || epoch == 0 || address.text() != text) {
    throw ArgumentError("arena: address must be shm:PID:START:FD:EPOCH, got '" +
                        text.substr(0, 96) + "'");
  }
  return address;
}

std::shared_ptr<Mapping> Mapping::create(uint64_t payload_bytes, uint32_t max_slots) {
  return create(make_header(payload_bytes, max_slots));
}

std::shared_ptr<Mapping> Mapping::create_on_device(int device, uint64_t payload_bytes,
                                                   uint32_t max_slots) {
  const FixedHeader sized = make_header(payload_bytes, max_slots, PayloadPlace::kDevice);
  auto memory = DeviceMemory::create(device, sized.payload_bytes);
  std::shared_ptr<Mapping> mapping = create(sized);
  mapping->payload_ = memory->data();
  mapping->device_memory_ = std::move(memory);
  return mapping;
}

std::shared_ptr<Mapping> Mapping::create(const FixedHeader& sized) {
  FixedHeader fixed = sized;
  expect_memory(fixed.total_bytes);
  fixed.epoch = random_epoch();
  fixed.producer_pid = ::getpid();
  fixed.producer_start = own_start();
  FileDescriptor fd(::memfd_create("specforge_ext_arena", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) fail("memfd_create", errno, __LINE__);
  if (::fchmod(fd.get(), 0600) != 0) fail("fchmod", errno, __LINE__);
  const auto bytes = static_cast<off_t>(fixed.total_bytes);
  if (::ftruncate(fd.get(), bytes) != 0) fail("ftruncate", errno, __LINE__);
  // MAP_POPULATE reports nothing: only this says that there is not enough memory.
  if (const int error = ::posix_fallocate(fd.get(), 0, bytes); error != 0) {
    fail("fallocate of " + std::to_string(bytes) + " bytes", error, __LINE__);
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    fail("fcntl(F_ADD_SEALS)", errno, __LINE__);
  }
  std::shared_ptr<Mapping> mapping(new Mapping(std::move(fd), fixed));
  mapping->reader_identity_ = own_identity();
  mapping->map(PROT_READ | PROT_WRITE);
  auto* header = new (mapping->control_) Header{};
  for (uint32_t i = 0; i < fixed.max_slots; ++i) new (&mapping->slot(i)) Slot{};
  header->fixed = fixed;
  return mapping;
}

std::shared_ptr<Mapping> Mapping::attach(const ArenaAddress& address) {
  const std::string path =
      "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.fd);
  FileDescriptor fd = open_memory(address, path);
  const FixedHeader fixed =
      check_arena(fd, path, address.epoch, address.text(), PayloadPlace::kFile);
  std::shared_ptr<Mapping> mapping(new Mapping(std::move(fd), fixed));
  mapping->reader_identity_ = own_identity();
  mapping->map(PROT_READ);
  return mapping;
}

std::shared_ptr<Mapping> Mapping::attach(Handover handover, const SocketAddress& address,
                                         PayloadPlace place) {
  const FixedHeader fixed =
      check_arena(handover.memory, address.path, address.epoch, address.text(), place);
  std::shared_ptr<Mapping> mapping(new Mapping(std::move(handover.memory), fixed));
  mapping->connection_ = std::move(handover.connection);
  mapping->process_ = std::move(handover.process);
  mapping->reader_identity_ = handover.identity;
  mapping->map(PROT_READ);
  return mapping;
}

std::shared_ptr<Mapping> Mapping::attach(const SocketAddress& address) {
  return attach(knock(address.path), address, PayloadPlace::kFile);
}

std::shared_ptr<Mapping> Mapping::attach_on_device(int device, const SocketAddress& address) {
  Handover handover = knock(address.path);
  const FileDescriptor payload = std::move(handover.payload);
  std::shared_ptr<Mapping> mapping = attach(std::move(handover), address, PayloadPlace::kDevice);
  if (!payload) {
    throw ArgumentError("arena " + address.text() + ": must come with the payload's descriptor");
  }
  mapping->device_memory_ =
      DeviceMemory::import(device, mapping->fixed_.payload_bytes, payload.get());
  mapping->payload_ = mapping->device_memory_->data();
  return mapping;
}

std::shared_ptr<Mapping> Mapping::attach(const std::string& address) {
  if (address.starts_with(kSocketPrefix)) return attach(SocketAddress::parse(address));
  return attach(ArenaAddress::parse(address));
}

bool Mapping::producer_alive() const {
  if (process_) return !process_ended(process_);
  return process_alive(static_cast<pid_t>(fixed_.producer_pid), fixed_.producer_start);
}

void Mapping::map(int payload_protection) {
  pid_ = ::getpid();
  const int flags = MAP_SHARED | MAP_POPULATE;
  void* control =
      ::mmap(nullptr, fixed_.control_bytes, PROT_READ | PROT_WRITE, flags, fd_.get(), 0);
  if (control == MAP_FAILED) fail("mmap of the slots", errno, __LINE__);
  control_ = static_cast<std::byte*>(control);
  if (fixed_.place == PayloadPlace::kDevice) return;
  void* payload = ::mmap(nullptr, fixed_.payload_bytes, payload_protection, flags, fd_.get(),
                         static_cast<off_t>(fixed_.control_bytes));
  if (payload == MAP_FAILED) fail("mmap of the payload", errno, __LINE__);
  payload_ = static_cast<std::byte*>(payload);
}

Mapping::~Mapping() {
  if (in_owning_process()) {
    for (const auto& call : before_unmap_) call();
  } else {
    // A forked child has no CUDA, and must not ask for any.
    static_cast<void>(device_memory_.release());
  }
  const bool in_file = fixed_.place == PayloadPlace::kFile;
  if (payload_ != nullptr && in_file) ::munmap(payload_, fixed_.payload_bytes);
  if (control_ != nullptr) ::munmap(control_, fixed_.control_bytes);
}

ArenaAddress Mapping::address() const {
  return {static_cast<pid_t>(fixed_.producer_pid), fixed_.producer_start, fd_.get(), fixed_.epoch};
}

bool Mapping::in_owning_process() const { return ::getpid() == pid_; }

void Mapping::signal_room() const {
  // Sequentially consistent against acquire(), which counts itself as a waiter before it reads
  // `room`: either it sees the new count or it is seen here.
  header().room.fetch_add(1);
  if (header().room_waiters.load() == 0) return;
  ::syscall(SYS_futex, &header().room, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace sf
