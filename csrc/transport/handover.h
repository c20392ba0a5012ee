// An arena's descriptors over a unix socket, for readers that do not share the producer's /proc:
// other containers, other pid namespaces. Numbers of processes mean nothing there, so each side
// sends a pidfd of itself, on which the other sees it end wherever it runs.
//
// One connection per reader, SOCK_SEQPACKET: reader -> Hello and its pidfd; producer -> Reply with
// the memfd, its own pidfd and the descriptor of a payload on a device. It stays open while the
// reader has the arena mapped.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "transport/file_descriptor.h"

namespace sf {

// A socket that only this user reaches: 0600, in a directory that must be this user's and 0700.
// One that a killed producer left is replaced. ArgumentError, MachineError.
FileDescriptor listen_at(const std::string& path);

struct Guest {
  FileDescriptor connection;  // hangs up when the reader unmaps the arena or ends
  FileDescriptor process;     // its pidfd
};

struct Arena {
  int memory;
  int process;  // the producer's pidfd
  uint64_t epoch;
  int payload = -1;  // of a payload on a device
};

// Who knocks, if anybody does. Nothing for another user's process, and for one that says nothing
// within a second or speaks another protocol: they are hung up on.
std::optional<Guest> meet(const FileDescriptor& listener);

// From then on the reader may take a place in the table as `identity`. False if it has left.
bool welcome(const Guest& guest, const Arena& arena, uint64_t identity);

struct Handover {
  FileDescriptor connection;
  FileDescriptor memory;
  FileDescriptor process;
  FileDescriptor payload;  // none unless it is on a device
  uint64_t epoch;
  uint64_t identity;
};

// ProducerLost if nobody listens or it hangs up, TransferTimeout after 10 s, ArgumentError if the
// other side is another user's or none of this protocol.
Handover knock(const std::string& path);

}  // namespace sf
