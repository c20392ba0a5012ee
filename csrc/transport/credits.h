// When an arena lets samples in: bytes are the credit, two marks decide.
#pragma once

#include <cstdint>
#include <string>

#include "core/error.h"

namespace sf {

// Shares of the capacity. Equal marks: every freed byte may be used again at once. A low mark below
// the high one lets a full arena drain that far first, so that its producer works in long bursts.
struct Watermarks {
  double high = 1;
  double low = 1;
};

class Credits {
 public:
  // ArgumentError unless 0 < low <= high <= 1.
  Credits(uint64_t capacity_bytes, Watermarks marks)
      : Credits(capacity_bytes, checked(marks), kChecked) {}

  // Closes if `nbytes` more would pass the high mark, opens once no more than the low one are used.
  // An empty arena takes any sample that fits: else one above the high mark would wait for ever.
  bool admit(uint64_t used_bytes, uint64_t nbytes) {
    if (used_bytes <= low_bytes_) closed_ = false;
    if (used_bytes == 0) return true;
    if (used_bytes > high_bytes_ || nbytes > high_bytes_ - used_bytes) closed_ = true;
    return !closed_;
  }

  bool closed() const { return closed_; }
  uint64_t low_bytes() const { return low_bytes_; }
  uint64_t high_bytes() const { return high_bytes_; }

 private:
  enum Checked { kChecked };
  Credits(uint64_t capacity_bytes, Watermarks marks, Checked)
      : high_bytes_(share(capacity_bytes, marks.high)),
        low_bytes_(share(capacity_bytes, marks.low)) {}

  static Watermarks checked(Watermarks marks) {
    if (marks.low > 0 && marks.low <= marks.high && marks.high <= 1) return marks;
    throw ArgumentError("arena: watermarks must be 0 < low <= high <= 1, got low " +
                        std::to_string(marks.low) + ", high " + std::to_string(marks.high));
  }
  static uint64_t share(uint64_t bytes, double part) {
    return part >= 1 ? bytes : static_cast<uint64_t>(static_cast<double>(bytes) * part);
  }

  uint64_t high_bytes_;
  uint64_t low_bytes_;
  bool closed_ = false;
};

}  // namespace sf
