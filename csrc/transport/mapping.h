// An arena's memory in this process: created by its producer, or attached by a reader.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport/device_memory.h"
#include "transport/file_descriptor.h"
#include "transport/layout.h"

namespace sf {

// Where a reader that shares the producer's /proc, and its user, finds an arena: the producer's own
// descriptor. Nothing has a name in a file system, so nothing is left behind by a kill -9.
struct ArenaAddress {
  pid_t pid;
  uint64_t start;
  int fd;
  uint64_t epoch;

  // "shm:PID:START:FD:EPOCH", the epoch as 16 hexadecimal digits.
  std::string text() const;
  // ArgumentError if it is not exactly of that form.
  static ArenaAddress parse(const std::string& text);
};

// Where a reader in another pid namespace finds it: handover.h. Both see the path.
struct SocketAddress {
  std::string path;
  uint64_t epoch;

  // "shm:unix:PATH:EPOCH", the epoch as 16 hexadecimal digits.
  std::string text() const;
  // ArgumentError if it is not exactly of that form.
  static SocketAddress parse(const std::string& text);
};

struct Handover;

class Mapping {
 public:
  // A memfd sealed against shrinking and growing, every page of it allocated and mapped.
  // MachineError if that much memory is not to be had; nothing is allocated then.
  static std::shared_ptr<Mapping> create(uint64_t payload_bytes, uint32_t max_slots);

  // The same with the payload in the memory of a GPU, by its ordinal: payload() is the device's
  // then. Everything else stays in a memfd, so that states, leases and waits are those of any
  // arena.
  static std::shared_ptr<Mapping> create_on_device(int device, uint64_t payload_bytes,
                                                   uint32_t max_slots);

  // Control pages read-write, payload read-only. ProducerLost if the producer is gone or has closed
  // the arena; ArgumentError if the file is not a sealed arena of this user.
  static std::shared_ptr<Mapping> attach(const ArenaAddress& address);

  // TransferTimeout if its producer does not answer.
  static std::shared_ptr<Mapping> attach(const SocketAddress& address);

  // Either form.
  static std::shared_ptr<Mapping> attach(const std::string& address);

  // To an arena on a device, for kernels of `device`, which may be another one. The descriptor of
  // such memory passes through a socket only. ArgumentError if the arena is not of that kind (nor
  // does attach() take one that is).
  static std::shared_ptr<Mapping> attach_on_device(int device, const SocketAddress& address);

  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const FixedHeader& fixed() const { return fixed_; }
  Header& header() const { return *reinterpret_cast<Header*>(control_); }
  Slot& slot(uint32_t index) const { return reinterpret_cast<Slot*>(control_ + kPageBytes)[index]; }
  std::byte* payload() const { return payload_; }
  int fd() const { return fd_.get(); }
  // Of a payload on a device that this process made; else -1.
  int payload_fd() const { return device_memory_ == nullptr ? -1 : device_memory_->fd(); }
  ArenaAddress address() const;

  // What this process writes into the table of readers: layout.h.
  uint64_t reader_identity() const { return reader_identity_; }

  bool producer_alive() const;

  // A forked child has the memory but not the leases: it must touch neither.
  bool in_owning_process() const;

  // Called once, after the last view of the payload is gone and before its pages are: for who has
  // registered them with a device. Not in a forked child. Must not throw.
  void before_unmap(std::function<void()> call) { before_unmap_.push_back(std::move(call)); }

  // Adds one to `room` and wakes the producer's waiting threads.
  void signal_room() const;

 private:
  Mapping(FileDescriptor fd, const FixedHeader& fixed) : fd_(std::move(fd)), fixed_(fixed) {}
  static std::shared_ptr<Mapping> create(const FixedHeader& sized);
  static std::shared_ptr<Mapping> attach(Handover handover, const SocketAddress& address,
                                         PayloadPlace place);
  void map(int payload_protection);

  FileDescriptor connection_;  // with process_: of a guest; none else
  FileDescriptor process_;
  FileDescriptor fd_;
  FixedHeader fixed_;
  pid_t pid_ = 0;
  uint64_t reader_identity_ = 0;
  std::byte* control_ = nullptr;
  std::byte* payload_ = nullptr;
  std::unique_ptr<DeviceMemory> device_memory_;
  std::vector<std::function<void()>> before_unmap_;
};

}  // namespace sf
