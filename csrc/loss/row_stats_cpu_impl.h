// Included by row_stats_cpu.cpp and its _avx2 and _avx512 sisters, each compiled for its own ISA.
#pragma once

#include <cmath>

#include "loss/row_passes.h"
#include "loss/row_stats_cpu.h"

namespace sf::cpu {
namespace {

template <class T>
RowStat row_stat(const T* row, int64_t vocab) {
  const SoftmaxStat stat = softmax_stat(row, vocab, 1);
  return {static_cast<float>(stat.top.value + ::log(stat.sum)),
          static_cast<int32_t>(stat.top.index)};
}

constexpr RowStatsKernels kKernels{row_stat<float>, row_stat<bf16>};

}  // namespace
}  // namespace sf::cpu
