#include "wire/fp8_rows_cpu_impl.h"

namespace sf::cpu {
const Fp8Kernels kFp8Avx512 = kKernels;
}
