#include <optional>
#include <span>

#include "attention/own_keys.h"
#include "bindings.h"
#include "convert.h"
#include "core/check.h"
#include "core/crc32c.h"
#include "core/huge_pages.h"
#include "core/isa.h"
#include "loss/loss_rows.h"
#include "loss/row_stats.h"
#include "loss/step_sums.h"
#include "pack/anchors.h"
#include "pack/block_mask.h"
#include "pack/cod_chains.h"
#include "pack/pack_samples.h"
#include "pack/ttt_maps.h"

namespace py = pybind11;

namespace sf {
namespace {

using Views = std::vector<TensorView>;
using NoGil = py::call_guard<py::gil_scoped_release>;

Stream stream_of(uintptr_t handle) { return {reinterpret_cast<void*>(handle)}; }

using OptionalViews = std::vector<std::optional<TensorView>>;

std::vector<PackSource> sources_of(const Views& ids, const Views& masks,
                                   const std::vector<Views>& features,
                                   const std::vector<OptionalViews>& scales) {
  if (masks.size() != ids.size() || features.size() != ids.size() ||
      (!scales.empty() && scales.size() != ids.size())) {
    throw ArgumentError(
        "pack_samples: ids, masks, features and scales must be of as many samples, "
        "got " +
        std::to_string(ids.size()) + ", " + std::to_string(masks.size()) + ", " +
        std::to_string(features.size()) + " and " + std::to_string(scales.size()));
  }
  std::vector<PackSource> out;
  for (size_t k = 0; k < ids.size(); ++k) {
    out.push_back({ids[k], masks[k], features[k], {}});
    if (scales.empty()) continue;
    for (const auto& scale : scales[k]) out.back().scales.push_back(scale.value_or(TensorView{}));
  }
  return out;
}

using MaybeView = std::optional<TensorView>;

// A tensor of rank 0 would pass for an absent one.
TensorView view_or_absent(const char* op, const char* name, const MaybeView& maybe) {
  if (!maybe) return {};
  if (maybe->rank == 0) {
    fail_argument(op, std::string(name) + " must have a dimension", maybe->str());
  }
  return *maybe;
}

LossKind loss_kind_of(const std::string& name) {
  constexpr std::pair<const char*, LossKind> kKinds[] = {
      {"hard_ce", LossKind::kHardCe},
      {"soft_ce", LossKind::kSoftCe},
      {"reverse_kl", LossKind::kReverseKl},
      {"jsd", LossKind::kJsd},
      {"l1", LossKind::kL1},
      {"lk_alpha", LossKind::kLkAlpha},
      {"lk_lambda", LossKind::kLkLambda},
  };
  std::string known;
  for (const auto& [other, kind] : kKinds) {
    if (name == other) return kind;
    known += (known.empty() ? "" : ", ") + std::string(other);
  }
  fail_argument("loss_rows", "kind must be one of " + known, name);
}

void bind_loss(py::module_& m) {
  m.def(
      "row_stats",
      [](const TensorView& logits, const TensorView& lse, const TensorView& argmax,
         uintptr_t stream) { row_stats(logits, lse, argmax, stream_of(stream)); },
      py::arg("logits"), py::arg("lse"), py::arg("argmax"), py::arg("stream") = 0, NoGil());
  m.def(
      "loss_rows",
      [](const TensorView& logits, const MaybeView& teacher, const TensorView& row_to_teacher,
         const TensorView& weight, const TensorView& loss, const TensorView& accepted,
         const TensorView& correct, const TensorView& top_prob, const TensorView& entropy,
         const std::string& kind, float temperature, float beta, float hard_weight,
         bool writes_gradient, const MaybeView& teacher_lse, const MaybeView& teacher_argmax,
         const MaybeView& label, const MaybeView& kl_weight, uintptr_t stream) {
        const auto view = [](const char* name, const MaybeView& maybe) {
          return view_or_absent("loss_rows", name, maybe);
        };
        loss_rows({logits, view("teacher", teacher), row_to_teacher, weight,
                   view("teacher_lse", teacher_lse), view("teacher_argmax", teacher_argmax),
                   view("label", label), view("kl_weight", kl_weight), loss, accepted, correct,
                   top_prob, entropy},
                  {loss_kind_of(kind), temperature, beta, hard_weight, writes_gradient},
                  stream_of(stream));
      },
      py::arg("logits"), py::arg("teacher"), py::arg("row_to_teacher"), py::arg("weight"),
      py::arg("loss"), py::arg("accepted"), py::arg("correct"), py::arg("top_prob"),
      py::arg("entropy"), py::kw_only(), py::arg("kind"), py::arg("temperature"), py::arg("beta"),
      py::arg("hard_weight"), py::arg("writes_gradient"), py::arg("teacher_lse") = py::none(),
      py::arg("teacher_argmax") = py::none(), py::arg("label") = py::none(),
      py::arg("kl_weight") = py::none(), py::arg("stream") = 0, NoGil());
  m.def(
      "step_sums",
      [](const TensorView& loss, const TensorView& accepted, const TensorView& correct,
         const TensorView& top_prob, const TensorView& entropy, const TensorView& weight,
         const TensorView& step, const TensorView& sums, uintptr_t stream) {
        step_sums({loss, accepted, correct, top_prob, entropy, weight, step, sums},
                  stream_of(stream));
      },
      py::arg("loss"), py::arg("accepted"), py::arg("correct"), py::arg("top_prob"),
      py::arg("entropy"), py::arg("weight"), py::arg("step"), py::arg("sums"),
      py::arg("stream") = 0, NoGil());
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
         const std::vector<OptionalViews>& scales, const TensorView& out_ids,
         const TensorView& out_mask, const TensorView& positions, const TensorView& cu_seqlens,
         const Views& out_features, uintptr_t stream) {
        pack_samples(sources_of(ids, masks, features, scales),
                     {out_ids, out_mask, positions, cu_seqlens, out_features}, stream_of(stream));
      },
      py::arg("ids"), py::arg("masks"), py::arg("features"), py::arg("scales"), py::arg("out_ids"),
      py::arg("out_mask"), py::arg("positions"), py::arg("cu_seqlens"), py::arg("out_features"),
      py::arg("stream") = 0, NoGil());
}

using OptionalViews = std::vector<std::optional<TensorView>>;

std::vector<OwnKeys> own_keys_of(const char* op, const Views& keys, const Views& values,
                                 const OptionalViews& rows) {
  if (values.size() != keys.size() || rows.size() != keys.size()) {
    throw ArgumentError(std::string(op) + ": keys, values and rows must be as many, got " +
                        std::to_string(keys.size()) + ", " + std::to_string(values.size()) +
                        " and " + std::to_string(rows.size()));
  }
  std::vector<OwnKeys> out;
  for (size_t j = 0; j < keys.size(); ++j) {
    if (rows[j] && rows[j]->rank == 0) {
      throw ArgumentError(std::string(op) + ": rows[" + std::to_string(j) +
                          "] must be [rows] i64, got a scalar");
    }
    out.push_back({keys[j], values[j], rows[j].value_or(TensorView{})});
  }
  return out;
}

std::vector<OwnKeyGrads> own_key_grads_of(const Views& keys, const Views& values) {
  if (values.size() != keys.size()) {
    throw ArgumentError("own_keys_grads: grad_keys and grad_values must be as many, got " +
                        std::to_string(keys.size()) + " and " + std::to_string(values.size()));
  }
  std::vector<OwnKeyGrads> out;
  for (size_t j = 0; j < keys.size(); ++j) out.push_back({keys[j], values[j]});
  return out;
}

void bind_attention(py::module_& m) {
  m.def(
      "own_keys_merge",
      [](const TensorView& query, const TensorView& out, const TensorView& lse, const Views& keys,
         const Views& values, const OptionalViews& rows, float scale, uintptr_t stream) {
        const auto own = own_keys_of("own_keys_merge", keys, values, rows);
        own_keys_merge({query, out, lse, own, scale}, stream_of(stream));
      },
      py::arg("query"), py::arg("out"), py::arg("lse"), py::arg("keys"), py::arg("values"),
      py::arg("rows"), py::arg("scale"), py::arg("stream") = 0, NoGil());
  m.def(
      "own_keys_grads",
      [](const TensorView& grad_out, const TensorView& query, const TensorView& out,
         const TensorView& lse, const TensorView& grad_query, const Views& keys,
         const Views& values, const OptionalViews& rows, const Views& grad_keys,
         const Views& grad_values, float scale, uintptr_t stream) {
        const auto own = own_keys_of("own_keys_grads", keys, values, rows);
        const auto grads = own_key_grads_of(grad_keys, grad_values);
        own_keys_grads({grad_out, query, out, lse, grad_query, own, grads, scale},
                       stream_of(stream));
      },
      py::arg("grad_out"), py::arg("query"), py::arg("out"), py::arg("lse"), py::arg("grad_query"),
      py::arg("keys"), py::arg("values"), py::arg("rows"), py::arg("grad_keys"),
      py::arg("grad_values"), py::arg("scale"), py::arg("stream") = 0, NoGil());
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

void bind_chains(py::module_& m) {
  m.def(
      "cod_chains",
      [](const TensorView& loss_mask, const TensorView& cu_seqlens, const TensorView& sample_keys,
         uint64_t seed, int64_t step, double ratio, double min_ratio, const TensorView& anchors,
         const TensorView& cu_depths) {
        cod_chains(loss_mask, cu_seqlens, sample_keys, {seed, step, ratio, min_ratio}, anchors,
                   cu_depths);
      },
      py::arg("loss_mask"), py::arg("cu_seqlens"), py::arg("sample_keys"), py::arg("seed"),
      py::arg("step"), py::arg("ratio"), py::arg("min_ratio"), py::arg("anchors"),
      py::arg("cu_depths"), NoGil());
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
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"), NoGil());
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_loss(m);
  bind_pack(m);
  bind_attention(m);
  bind_core(m);
  bind_blocks(m);
  bind_chains(m);
}

}  // namespace sf
