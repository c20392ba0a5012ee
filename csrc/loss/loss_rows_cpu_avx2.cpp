#include "loss/loss_rows_cpu_impl.h"

namespace sf::cpu {
const LossKernels kLossAvx2 = kKernels;
}
