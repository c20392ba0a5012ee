#include "pack/ttt_maps.h"

#include <limits>

#include "core/backends.h"
#include "core/check.h"

namespace sf {
namespace {

// Everything that can be known without reading device memory. Returns T.
int64_t check_inputs(const char* op, const TensorView& mask, const TensorView& cu_seqlens,
                     const TensorView& counts) {
  Dim T{"T"}, bounds{"N+1"}, entries{"L+3"};
  expect(op, "mask", mask).dtype({kU8}).shape({&T}).contiguous();
  expect(op, "cu_seqlens", cu_seqlens)
      .dtype({kI32})
      .shape({&bounds})
      .contiguous()
      .device(mask.device);
  expect(op, "counts", counts).dtype({kI64}).shape({&entries}).contiguous().device(mask.device);
  require(bounds >= 1, op, "cu_seqlens must hold N+1 entries, at least 1", bounds);
  const int64_t length = entries - 3;
  require(length >= 1 && length <= kMaxTttLength, op, "ttt_length must be in [1, 64]", length);
  require(T * length <= std::numeric_limits<int32_t>::max(), op,
          "T * ttt_length must be below 2^31", T * length);
  return T;
}

}  // namespace

void ttt_counts(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
                Stream stream) {
  constexpr const char* kOp = "ttt_counts";
  check_inputs(kOp, mask, cu_seqlens, counts);
  backend(kOp, mask.device, &cpu::ttt_counts, SF_CUDA_FN(cuda::ttt_counts))(mask, cu_seqlens,
                                                                            counts, stream);
}

void ttt_fill(const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
              const TttMaps& out, Stream stream) {
  constexpr const char* kOp = "ttt_fill";
  const int64_t T = check_inputs(kOp, mask, cu_seqlens, counts);
  Dim active{"A"}, parent{"A - num_active[0]"}, pairs{"num_pairs"}, teachers{"num_teacher_rows"};
  const auto arg = [&](const char* name, const TensorView& view, Dim& size) {
    expect(kOp, name, view).dtype({kI32}).shape({&size}).contiguous().device(mask.device);
  };
  arg("active", out.active, active);
  arg("parent", out.parent, parent);
  arg("pair_source", out.pair_source, pairs);
  arg("pair_step", out.pair_step, pairs);
  arg("pair_teacher", out.pair_teacher, pairs);
  arg("teacher_rows", out.teacher_rows, teachers);
  if (T == 0) return;
  backend(kOp, mask.device, &cpu::ttt_fill, SF_CUDA_FN(cuda::ttt_fill))(mask, cu_seqlens, counts,
                                                                        out, stream);
}

}  // namespace sf
