#include "loss/soft_ce_rows_cpu_impl.h"

namespace sf::cpu {
const SoftCeKernels kSoftCeAvx2 = kKernels;
}
