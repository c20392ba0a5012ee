#include "transport/attendant.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.h"
#include "transport/process.h"

namespace sf {

Attendant::Attendant(std::shared_ptr<Mapping> mapping, std::function<void()> reap)
    : mapping_(std::move(mapping)),
      reap_(std::move(reap)),
      bell_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!bell_) throw MachineError("eventfd", std::strerror(errno), __FILE__, __LINE__);
}

Attendant::~Attendant() {
  if (!mapping_->in_owning_process()) {
    // A forked child has no such thread: neither to be joined nor to be destroyed unjoined.
    static_cast<void>(thread_.release());
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  ring();
  if (thread_ != nullptr) thread_->join();
  if (!path_.empty()) ::unlink(path_.c_str());
}

void Attendant::watch() {
  if (table_digest() == watched_.load()) return;
  {
    const std::lock_guard lock(mutex_);
    start_locked();
  }
  ring();
}

void Attendant::serve(const std::string& path) {
  {
    const std::lock_guard lock(mutex_);
    if (!path_.empty()) {
      throw ArgumentError("arena: must be served at one path, it is at " + path_ + ", got " + path);
    }
    own_process_ = open_own_process();
    listener_ = listen_at(path);
    path_ = path;
    start_locked();
  }
  ring();
}

bool Attendant::guest_ended(uint64_t identity) {
  const std::lock_guard lock(mutex_);
  const auto guest = guests_.find(identity);
  return guest == guests_.end() || process_ended(guest->second.process);
}

void Attendant::start_locked() {
  if (thread_ != nullptr) return;
  // Signals are for the threads of the program, which may be waiting for one.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::make_unique<std::thread>([this] { run(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Attendant::ring() {
  const uint64_t one = 1;
  // Fails only if it rings already.
  static_cast<void>(!::write(bell_.get(), &one, sizeof one));
}

void Attendant::run() {
  for (;;) {
    std::vector<pollfd> fds{{bell_.get(), POLLIN, 0}, listener()};
    look_at_guests(fds);
    if (!look_at_locals(fds)) reap_();
    ::poll(fds.data(), fds.size(), -1);
    uint64_t rings;
    static_cast<void>(!::read(bell_.get(), &rings, sizeof rings));
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) return;
    }
    if (fds[1].revents != 0) let_in();
    const bool any_ended =
        std::any_of(fds.begin() + 2, fds.end(), [](const pollfd& fd) { return fd.revents != 0; });
    if (!any_ended) continue;
    reap_();
    forget_guests();
  }
}

pollfd Attendant::listener() {
  const std::lock_guard lock(mutex_);
  return {listener_.get(), POLLIN, 0};  // poll passes over a -1
}

void Attendant::look_at_guests(std::vector<pollfd>& fds) {
  const std::lock_guard lock(mutex_);
  for (const auto& [identity, guest] : guests_) {
    fds.push_back({guest.process.get(), POLLIN, 0});
    if (guest.connection) fds.push_back({guest.connection.get(), 0, 0});
  }
}

// False if one of them is gone already. Without pidfds the caller's own looking has to do.
bool Attendant::look_at_locals(std::vector<pollfd>& fds) {
  std::map<uint64_t, FileDescriptor> seen;
  bool all_there = true;
  // Before the places are read: one that is taken meanwhile changes the digest again.
  watched_.store(table_digest());
  for (const ConsumerWord& place : mapping_->header().consumers) {
    const uint64_t identity = place.load(std::memory_order_acquire);
    if (identity == 0 || is_guest(identity) || seen.count(identity) != 0) continue;
    const auto known = locals_.find(identity);
    FileDescriptor fd = known != locals_.end()
                            ? std::move(known->second)
                            : open_process(static_cast<pid_t>(identity & UINT32_MAX));
    if (fd) fds.push_back({fd.get(), POLLIN, 0});
    if (!fd) all_there = false;
    seen.emplace(identity, std::move(fd));
  }
  locals_ = std::move(seen);
  return all_there;
}

// 0 for an empty table, else different for different readers but for a chance of 2^-64.
uint64_t Attendant::table_digest() const {
  uint64_t digest = 0;
  for (const ConsumerWord& place : mapping_->header().consumers) {
    uint64_t word = place.load(std::memory_order_acquire) * 0x9e3779b97f4a7c15;
    digest += word ^ (word >> 29);
  }
  return digest;
}

bool Attendant::in_table(uint64_t identity) const {
  const auto& places = mapping_->header().consumers;
  return std::any_of(std::begin(places), std::end(places), [&](const ConsumerWord& place) {
    return place.load(std::memory_order_acquire) == identity;
  });
}

void Attendant::let_in() {
  // Not under the lock, for it may take a second. serve() wrote both members once, before.
  auto guest = meet(listener_);
  if (!guest) return;
  const uint64_t identity = guest_identity(++num_guests_ever_);
  const Arena arena{mapping_->fd(), own_process_.get(), mapping_->fixed().epoch,
                    mapping_->payload_fd()};
  const std::lock_guard lock(mutex_);
  // Known before it is let in: the word of an unknown reader counts as one of the dead.
  const auto it = guests_.emplace(identity, std::move(*guest)).first;
  if (!welcome(it->second, arena, identity)) guests_.erase(it);
}

// Of those who have ended, or have unmapped the arena and live on.
void Attendant::forget_guests() {
  const std::lock_guard lock(mutex_);
  for (auto it = guests_.begin(); it != guests_.end();) {
    Guest& guest = it->second;
    pollfd hung_up{guest.connection.get(), 0, 0};
    if (guest.connection && ::poll(&hung_up, 1, 0) == 1) guest.connection = FileDescriptor();
    const bool gone = process_ended(guest.process) || !guest.connection;
    it = gone && !in_table(it->first) ? guests_.erase(it) : std::next(it);
  }
}

}  // namespace sf
