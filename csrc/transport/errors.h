// What can go wrong with an arena that a caller may want to tell apart.
// Python raises the classes of the same names in specforge_ext.store.base.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sf {

class TransportError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The generation or the epoch is not the arena's any more, or the sample was acknowledged.
class StaleRef : public TransportError {
 public:
  using TransportError::TransportError;
};

// The bytes are not those that were put.
class CorruptFeature : public TransportError {
 public:
  using TransportError::TransportError;
};

// The process that fills the arena is gone.
class ProducerLost : public TransportError {
 public:
  using TransportError::TransportError;
};

// A sample that can never fit.
class StoreFull : public TransportError {
 public:
  StoreFull(uint64_t needed, uint64_t available)
      : TransportError("sample of " + std::to_string(needed) + " bytes does not fit an arena of " +
                       std::to_string(available) + " bytes"),
        needed(needed),
        available(available) {}
  uint64_t needed;
  uint64_t available;
};

// A wait ended at its deadline.
class TransferTimeout : public TransportError {
 public:
  TransferTimeout(const std::string& what, double waited_s)
      : TransportError("waited " + std::to_string(waited_s) + " s for " + what),
        what_for(what),
        waited_s(waited_s) {}
  std::string what_for;
  double waited_s;
};

}  // namespace sf
