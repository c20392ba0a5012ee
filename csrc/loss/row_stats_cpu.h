// The part of row_stats that exists once per instruction set. Internal.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace sf::cpu {

struct RowStat {
  float lse;
  int32_t argmax;
};

struct RowStatsKernels {
  RowStat (*f32)(const float* row, int64_t vocab);
  RowStat (*b16)(const bf16* row, int64_t vocab);
};

extern const RowStatsKernels kRowStatsPlain, kRowStatsAvx2, kRowStatsAvx512;

}  // namespace sf::cpu
