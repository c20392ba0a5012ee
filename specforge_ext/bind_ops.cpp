#include <span>

#include "bindings.h"
#include "convert.h"
#include "core/check.h"
#include "core/crc32c.h"
#include "core/isa.h"
#include "loss/row_stats.h"
#include "loss/soft_ce_rows.h"
#include "loss/step_sums.h"
#include "pack/anchors.h"
#include "pack/block_mask.h"
#include "pack/pack_samples.h"
#include "pack/ttt_maps.h"

namespace py = pybind11;

namespace sf {
namespace {

using Views = std::vector<TensorView>;
using NoGil = py::call_guard<py::gil_scoped_release>;

Stream stream_of(uintptr_t handle) { return {reinterpret_cast<void*>(handle)}; }

std::vector<PackSource> sources_of(const Views& ids, const Views& masks,
                                   const std::vector<Views>& features) {
  if (masks.size() != ids.size() || features.size() != ids.size()) {
    throw ArgumentError("pack_samples: ids, masks and features must be of as many samples, got " +
                        std::to_string(ids.size()) + ", " + std::to_string(masks.size()) + " and " +
                        std::to_string(features.size()));
  }
  std::vector<PackSource> out;
  for (size_t k = 0; k < ids.size(); ++k) out.push_back({ids[k], masks[k], features[k]});
  return out;
}

void bind_loss(py::module_& m) {
  m.def(
      "row_stats",
      [](const TensorView& logits, const TensorView& lse, const TensorView& argmax,
         uintptr_t stream) { row_stats(logits, lse, argmax, stream_of(stream)); },
      py::arg("logits"), py::arg("lse"), py::arg("argmax"), py::arg("stream") = 0, NoGil());
  m.def(
      "soft_ce_rows",
      [](const TensorView& logits, const TensorView& teacher, const TensorView& row_to_teacher,
         const TensorView& weight, const TensorView& teacher_lse, const TensorView& loss,
         const TensorView& accepted, const TensorView& correct, uintptr_t stream) {
        soft_ce_rows(
            {logits, teacher, row_to_teacher, weight, teacher_lse, loss, accepted, correct},
            stream_of(stream));
      },
      py::arg("logits"), py::arg("teacher"), py::arg("row_to_teacher"), py::arg("weight"),
      py::arg("teacher_lse"), py::arg("loss"), py::arg("accepted"), py::arg("correct"),
      py::arg("stream") = 0, NoGil());
  m.def(
      "step_sums",
      [](const TensorView& loss, const TensorView& accepted, const TensorView& correct,
         const TensorView& weight, const TensorView& step, const TensorView& sums,
         uintptr_t stream) {
        step_sums({loss, accepted, correct, weight, step, sums}, stream_of(stream));
      },
      py::arg("loss"), py::arg("accepted"), py::arg("correct"), py::arg("weight"), py::arg("step"),
      py::arg("sums"), py::arg("stream") = 0, NoGil());
}

void bind_pack(py::module_& m) {
  m.def(
      "ttt_counts",
      [](const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
         uintptr_t stream) { ttt_counts(mask, cu_seqlens, counts, stream_of(stream)); },
      py::arg("mask"), py::arg("cu_seqlens"), py::arg("counts"), py::arg("stream") = 0, NoGil());
  m.def(
      "ttt_fill",
      [](const TensorView& mask, const TensorView& cu_seqlens, const TensorView& counts,
         const TensorView& active, const TensorView& parent, const TensorView& pair_source,
         const TensorView& pair_step, const TensorView& pair_teacher,
         const TensorView& teacher_rows, uintptr_t stream) {
        ttt_fill(mask, cu_seqlens, counts,
                 {active, parent, pair_source, pair_step, pair_teacher, teacher_rows},
                 stream_of(stream));
      },
      py::arg("mask"), py::arg("cu_seqlens"), py::arg("counts"), py::arg("active"),
      py::arg("parent"), py::arg("pair_source"), py::arg("pair_step"), py::arg("pair_teacher"),
      py::arg("teacher_rows"), py::arg("stream") = 0, NoGil());
  m.def(
      "pack_samples",
      [](const Views& ids, const Views& masks, const std::vector<Views>& features,
         const TensorView& out_ids, const TensorView& out_mask, const TensorView& positions,
         const TensorView& cu_seqlens, const Views& out_features) {
        pack_samples(sources_of(ids, masks, features),
                     {out_ids, out_mask, positions, cu_seqlens, out_features});
      },
      py::arg("ids"), py::arg("masks"), py::arg("features"), py::arg("out_ids"),
      py::arg("out_mask"), py::arg("positions"), py::arg("cu_seqlens"), py::arg("out_features"),
      NoGil());
}

BlockMaskLists lists_of(const Views& views) {
  if (views.size() != 4) {
    throw ArgumentError("block_mask: a side of the output must be 4 tensors, got " +
                        std::to_string(views.size()));
  }
  return {views[0], views[1], views[2], views[3]};
}

void bind_blocks(py::module_& m) {
  m.def(
      "draw_anchors",
      [](const TensorView& loss_mask, const TensorView& cu_seqlens, const TensorView& sample_keys,
         uint64_t seed, int64_t step, int64_t max_anchors, const TensorView& anchors,
         const TensorView& cu_anchors) {
        draw_anchors(loss_mask, cu_seqlens, sample_keys, {seed, step, max_anchors}, anchors,
                     cu_anchors);
      },
      py::arg("loss_mask"), py::arg("cu_seqlens"), py::arg("sample_keys"), py::arg("seed"),
      py::arg("step"), py::arg("max_anchors"), py::arg("anchors"), py::arg("cu_anchors"), NoGil());
  m.def(
      "block_mask",
      [](const TensorView& anchors, const TensorView& cu_anchors, const TensorView& cu_seqlens,
         int64_t context, int64_t block_size, int64_t window, int64_t q_tile, int64_t kv_tile,
         const Views& kv, const Views& q, uintptr_t stream) {
        block_mask(
            {anchors, cu_anchors, cu_seqlens, {context, block_size, window, q_tile, kv_tile}},
            {lists_of(kv), lists_of(q)}, stream_of(stream));
      },
      py::arg("anchors"), py::arg("cu_anchors"), py::arg("cu_seqlens"), py::arg("context"),
      py::arg("block_size"), py::arg("window"), py::arg("q_tile"), py::arg("kv_tile"),
      py::arg("kv"), py::arg("q"), py::arg("stream") = 0, NoGil());
}

std::span<const char> bytes_of(const py::buffer_info& info) {
  if (info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != info.itemsize)) {
    throw ArgumentError("crc32c: data must be one-dimensional and contiguous, got " +
                        std::to_string(info.ndim) + " dimensions");
  }
  return {static_cast<const char*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

uint32_t copy_and_checksum(const TensorView& dst, const TensorView& src, uint32_t crc) {
  for (const TensorView* view : {&dst, &src}) {
    expect("copy_crc32c", view == &dst ? "dst" : "src", *view).contiguous().device({});
  }
  require(dst.nbytes() == src.nbytes(), "copy_crc32c", "dst must be of as many bytes as src",
          dst.nbytes());
  return copy_crc32c(dst.data, src.data, static_cast<size_t>(src.nbytes()), crc);
}

void bind_core(py::module_& m) {
  const auto checksum = [](uint32_t (*f)(const void*, size_t, uint32_t)) {
    return [f](const py::buffer& data, uint32_t crc) {
      const py::buffer_info info = data.request();
      const std::span<const char> bytes = bytes_of(info);
      py::gil_scoped_release release;
      return f(bytes.data(), bytes.size(), crc);
    };
  };
  m.def("crc32c", checksum(&crc32c), py::arg("data"), py::arg("crc") = 0);
  m.def("crc32c_table", checksum(&crc32c_table), py::arg("data"), py::arg("crc") = 0);
  m.def("copy_crc32c", &copy_and_checksum, py::arg("dst"), py::arg("src"), py::arg("crc") = 0,
        NoGil());
  m.def("isa", [] { return isa_name(isa()); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("has_fast_bf16", &has_fast_bf16);
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_loss(m);
  bind_pack(m);
  bind_core(m);
  bind_blocks(m);
}

}  // namespace sf
