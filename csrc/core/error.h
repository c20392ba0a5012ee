// The two kinds of errors of this library. Nothing prints, nothing exits.
#pragma once

#include <stdexcept>
#include <string>

namespace sf {

// The caller's fault: what was wanted and what came. Becomes ValueError in Python.
class ArgumentError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The machine's fault: carries the failed call, the file, the line and the system's own text.
class MachineError : public std::runtime_error {
 public:
  MachineError(const std::string& call, const std::string& text, const char* file, int line)
      : std::runtime_error(call + ": " + text + " (" + file + ":" + std::to_string(line) + ")") {}
};

}  // namespace sf
