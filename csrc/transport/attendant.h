// A producer's thread for what happens in other processes: it sleeps until a reader ends, however
// and wherever, or one knocks at the arena's socket. Started by the first need of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transport/handover.h"
#include "transport/mapping.h"

struct pollfd;

namespace sf {

class Attendant {
 public:
  // `reap` is called, in the thread, after a reader has ended.
  Attendant(std::shared_ptr<Mapping> mapping, std::function<void()> reap);
  ~Attendant();
  Attendant(const Attendant&) = delete;
  Attendant& operator=(const Attendant&) = delete;

  // Watches every reader of the table from now on; those that join through /proc later from the
  // next call on. Costs a look at the table if none did.
  void watch();

  // Lets readers in at `path`; the file goes with this object. ArgumentError if that was done
  // before, or as listen_at.
  void serve(const std::string& path);

  // Whether the reader of this word of the table, let in at the socket, has ended.
  bool guest_ended(uint64_t identity);

 private:
  void start_locked();
  void ring();
  void run();
  uint64_t table_digest() const;
  pollfd listener();
  void look_at_guests(std::vector<pollfd>& fds);
  bool look_at_locals(std::vector<pollfd>& fds);
  bool in_table(uint64_t identity) const;
  void let_in();
  void forget_guests();

  std::shared_ptr<Mapping> mapping_;
  std::function<void()> reap_;
  FileDescriptor bell_;
  std::atomic<uint64_t> watched_{0};           // the table's digest when the thread last looked
  std::map<uint64_t, FileDescriptor> locals_;  // word of the table -> pidfd; the thread's alone
  uint32_t num_guests_ever_ = 0;               // the thread's alone
  std::mutex mutex_;                           // all below
  std::string path_;
  FileDescriptor listener_;
  FileDescriptor own_process_;
  std::map<uint64_t, Guest> guests_;
  bool stopping_ = false;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace sf
