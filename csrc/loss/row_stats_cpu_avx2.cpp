#include "loss/row_stats_cpu_impl.h"

namespace sf::cpu {
const RowStatsKernels kRowStatsAvx2 = kKernels;
}
