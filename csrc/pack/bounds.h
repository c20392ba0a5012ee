// Prefix sums that come from the caller: 0 ... total, never falling.
#pragma once

#include <string>

#include "core/check.h"

namespace sf {

// Reads host memory.
inline void require_prefix_sums(const char* op, const std::string& name, const TensorView& sums,
                                int64_t total) {
  const int32_t* values = sums.as<const int32_t>();
  const auto demand = [&](bool ok, const std::string& wanted, int64_t got) {
    if (!ok) fail_argument(op, name + " must " + wanted, std::to_string(got));
  };
  const int64_t last = sums.shape[0] - 1;
  demand(values[0] == 0, "start at 0", values[0]);
  for (int64_t k = 0; k < last; ++k) {
    demand(values[k] <= values[k + 1], "not fall", values[k + 1]);
  }
  demand(values[last] == total, "end at " + std::to_string(total), values[last]);
}

}  // namespace sf
