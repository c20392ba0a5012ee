#include "attention/own_keys_cpu_impl.h"

namespace sf::cpu {
const OwnKeysKernels kOwnKeysAvx2 = kKernels;
}
