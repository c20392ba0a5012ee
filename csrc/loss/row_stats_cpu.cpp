#include "core/isa.h"
#include "loss/row_stats.h"
#include "loss/row_stats_cpu_impl.h"

namespace sf::cpu {

const RowStatsKernels kRowStatsPlain = kKernels;

namespace {

const RowStatsKernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512:
      return kRowStatsAvx512;
    case Isa::kAvx2:
      return kRowStatsAvx2;
    case Isa::kPlain:
      break;
  }
  return kRowStatsPlain;
}

template <class T>
void run(RowStat (*kernel)(const T*, int64_t), const TensorView& logits, float* lse,
         int32_t* argmax) {
  const int64_t rows = logits.shape[0], vocab = logits.shape[1];
  const T* data = logits.as<const T>();
#pragma omp parallel for schedule(static) if (rows > 1 && rows * vocab > kBlock * 16)
  for (int64_t n = 0; n < rows; ++n) {
    const RowStat stat = kernel(data + n * vocab, vocab);
    lse[n] = stat.lse;
    argmax[n] = stat.argmax;
  }
}

}  // namespace

void row_stats(const TensorView& logits, const TensorView& lse, const TensorView& argmax, Stream) {
  if (logits.dtype == kBF16) {
    run(kernels().b16, logits, lse.as<float>(), argmax.as<int32_t>());
  } else {
    run(kernels().f32, logits, lse.as<float>(), argmax.as<int32_t>());
  }
}

}  // namespace sf::cpu
