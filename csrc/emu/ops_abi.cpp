// The CUDA launchers as C functions for ctypes, run by the emulator. Each returns nullptr, or the
// error's text (valid until the next call). dtype codes are those of sf::DType.
#include <exception>
#include <string>
#include <vector>

#include "attention/own_keys.h"
#include "emu/emu.h"
#include "emu/planted_bugs.h"
#include "loss/loss_rows_plan.h"
#include "loss/row_stats.h"
#include "loss/step_sums.h"
#include "pack/block_mask.h"
#include "pack/pack_samples.h"
#include "pack/ttt_maps.h"
#include "wire/bytes_crc.h"
#include "wire/fp8_rows.h"

namespace {

std::string last_error;

template <class F>
const char* guarded(F&& call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

sf::TensorView view(void* data, sf::DType dtype, std::initializer_list<int64_t> shape) {
  return sf::view_of(data, dtype, shape, {sf::DeviceType::kCUDA, 0});
}

sf::DType code(int dtype) { return static_cast<sf::DType>(dtype); }

// What all tensors of own_keys have in common. A step is 6 words of `table`: own_rows and the
// addresses of keys, values, rows (0: none), and of the gradients of keys and values.
struct OwnKeysCase {
  sf::DType dtype;
  int64_t rows, heads, head_dim, kv_heads;
  std::vector<sf::OwnKeys> own;
  std::vector<sf::OwnKeyGrads> grads;

  OwnKeysCase(int dtype_, int64_t rows_, int64_t heads_, int64_t head_dim_, int64_t kv_heads_,
              const int64_t* table, int64_t depth)
      : dtype(code(dtype_)), rows(rows_), heads(heads_), head_dim(head_dim_), kv_heads(kv_heads_) {
    for (const int64_t* step = table; step != table + 6 * depth; step += 6) {
      const auto keys = [&](int64_t address) {
        return view(reinterpret_cast<void*>(address), dtype, {step[0], kv_heads, head_dim});
      };
      sf::TensorView index;
      if (step[3] != 0) index = view(reinterpret_cast<void*>(step[3]), sf::kI64, {rows});
      own.push_back({keys(step[1]), keys(step[2]), index});
      grads.push_back({keys(step[4]), keys(step[5])});
    }
  }
  sf::TensorView query(void* data) const { return view(data, dtype, {rows, heads, head_dim}); }
  sf::TensorView lse(void* data) const { return view(data, sf::kF32, {rows, heads}); }
};

}  // namespace

extern "C" {

void emu_set_order(int order, uint64_t seed) {
  sf::emu::set_order(static_cast<sf::emu::Order>(order), seed);
}

const char* emu_planted(const char* name, float* out) {
  return guarded([&] { sf::emu::run_planted(name, out); });
}

const char* emu_row_stats(void* logits, int dtype, int64_t rows, int64_t vocab, void* lse,
                          void* argmax, int device) {
  return guarded([&] {
    sf::TensorView z = view(logits, code(dtype), {rows, vocab});
    z.device.index = device;
    sf::cuda::row_stats(z, view(lse, sf::kF32, {rows}), view(argmax, sf::kI32, {rows}), {});
  });
}

// Null: absent. access -1: the path that the launcher chooses, else that of sf::cuda::Access.
const char* emu_loss_rows(void* logits, int dtype, int64_t rows, int64_t vocab, void* teacher,
                          int teacher_dtype, int64_t teacher_rows, int64_t teacher_vocab,
                          void* row_to_teacher, void* weight, void* teacher_lse,
                          void* teacher_argmax, void* label, void* kl_weight, void* loss,
                          void* accepted, void* correct, void* top_prob, void* entropy, int kind,
                          double temperature, double beta, double hard_weight, int writes_gradient,
                          int access, int cluster) {
  const auto optional = [](void* data, sf::DType type, std::initializer_list<int64_t> shape) {
    return data == nullptr ? sf::TensorView{} : view(data, type, shape);
  };
  return guarded([&] {
    const sf::LossRows args{view(logits, code(dtype), {rows, vocab}),
                            optional(teacher, code(teacher_dtype), {teacher_rows, teacher_vocab}),
                            view(row_to_teacher, sf::kI32, {rows}),
                            view(weight, sf::kF32, {rows}),
                            optional(teacher_lse, sf::kF32, {teacher_rows}),
                            optional(teacher_argmax, sf::kI32, {teacher_rows}),
                            optional(label, sf::kI32, {teacher_rows}),
                            optional(kl_weight, sf::kF32, {rows}),
                            view(loss, sf::kF32, {rows}),
                            view(accepted, sf::kF32, {rows}),
                            view(correct, sf::kU8, {rows}),
                            view(top_prob, sf::kF32, {rows}),
                            view(entropy, sf::kF32, {rows})};
    const sf::LossSpec spec{static_cast<sf::LossKind>(kind), static_cast<float>(temperature),
                            static_cast<float>(beta), static_cast<float>(hard_weight),
                            writes_gradient != 0};
    if (access < 0) return sf::cuda::loss_rows(args, spec, {});
    sf::cuda::loss_rows_planned(
        args, spec, {static_cast<sf::cuda::Access>(access), static_cast<unsigned>(cluster)}, {});
  });
}

// plan [2]: access, cluster.
const char* emu_loss_rows_plan(int capability_major, int64_t vocab, int dtype, int teacher_dtype,
                               int aligned, int64_t* plan) {
  return guarded([&] {
    const sf::cuda::RowPlan chosen = sf::cuda::plan_rows(
        {capability_major, vocab, code(dtype), code(teacher_dtype), aligned != 0});
    plan[0] = static_cast<int64_t>(chosen.access);
    plan[1] = chosen.cluster;
  });
}

const char* emu_step_sums(void* loss, void* accepted, void* correct, void* top_prob, void* entropy,
                          void* weight, void* step, int64_t rows, void* sums, int64_t num_steps) {
  return guarded([&] {
    sf::cuda::step_sums({view(loss, sf::kF32, {rows}), view(accepted, sf::kF32, {rows}),
                         view(correct, sf::kU8, {rows}), view(top_prob, sf::kF32, {rows}),
                         view(entropy, sf::kF32, {rows}), view(weight, sf::kF32, {rows}),
                         view(step, sf::kI32, {rows}), view(sums, sf::kF64, {7, num_steps})},
                        {});
  });
}

const char* emu_ttt_counts(void* mask, int64_t tokens, void* cu_seqlens, int64_t samples,
                           void* counts, int64_t ttt_length) {
  return guarded([&] {
    sf::cuda::ttt_counts(view(mask, sf::kU8, {tokens}), view(cu_seqlens, sf::kI32, {samples + 1}),
                         view(counts, sf::kI64, {ttt_length + 3}), {});
  });
}

const char* emu_ttt_fill(void* mask, int64_t tokens, void* cu_seqlens, int64_t samples,
                         int64_t* counts, int64_t ttt_length, void* active, void* parent,
                         void* pair_source, void* pair_step, void* pair_teacher,
                         void* teacher_rows) {
  return guarded([&] {
    int64_t active_rows = 0;
    for (int64_t i = 0; i < ttt_length; ++i) active_rows += counts[i];
    const int64_t pairs = counts[ttt_length];
    sf::cuda::ttt_fill(
        view(mask, sf::kU8, {tokens}), view(cu_seqlens, sf::kI32, {samples + 1}),
        view(counts, sf::kI64, {ttt_length + 3}),
        {view(active, sf::kI32, {active_rows}), view(parent, sf::kI32, {active_rows - counts[0]}),
         view(pair_source, sf::kI32, {pairs}), view(pair_step, sf::kI32, {pairs}),
         view(pair_teacher, sf::kI32, {pairs}),
         view(teacher_rows, sf::kI32, {counts[ttt_length + 1]})},
        {});
  });
}

// Arrays of pointers by sample, or by (sample, feature); a scale of nullptr: not encoded.
const char* emu_pack_samples(int64_t samples, const int64_t* lengths, void** ids, void** masks,
                             int64_t features, const int64_t* widths, const int64_t* dtypes,
                             void** data, void** scales, const int64_t* groups, void** packed,
                             void* out_ids, void* out_mask, void* positions, void* cu_seqlens) {
  return guarded([&] {
    std::vector<sf::PackSource> sources;
    int64_t total = 0;
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t length = lengths[k];
      sf::PackSource source{
          view(ids[k], sf::kI32, {length}), view(masks[k], sf::kU8, {length}), {}, {}};
      for (int64_t f = 0; f < features; ++f) {
        const int64_t at = k * features + f;
        const bool encoded = groups[at] > 0;
        source.features.push_back(view(
            data[at], encoded ? sf::kU8 : code(static_cast<int>(dtypes[f])), {length, widths[f]}));
        source.scales.push_back(encoded ? view(scales[at], sf::kF32, {length, groups[at]})
                                        : sf::TensorView{});
      }
      sources.push_back(source);
      total += length;
    }
    sf::PackedViews out{view(out_ids, sf::kI64, {total}),
                        view(out_mask, sf::kU8, {total}),
                        view(positions, sf::kI64, {total}),
                        view(cu_seqlens, sf::kI32, {samples + 1}),
                        {}};
    for (int64_t f = 0; f < features; ++f) {
      out.features.push_back(
          view(packed[f], code(static_cast<int>(dtypes[f])), {total, widths[f]}));
    }
    sf::cuda::pack_samples(sources, out, {});
  });
}

const char* emu_own_keys_merge(void* query, void* out, void* lse, int dtype, int64_t rows,
                               int64_t heads, int64_t head_dim, int64_t kv_heads,
                               const int64_t* table, int64_t depth, const float* scale) {
  return guarded([&] {
    const OwnKeysCase c(dtype, rows, heads, head_dim, kv_heads, table, depth);
    sf::cuda::own_keys_merge({c.query(query), c.query(out), c.lse(lse), c.own, *scale}, {});
  });
}

const char* emu_own_keys_grads(void* grad_out, void* query, void* out, void* lse, void* grad_query,
                               int dtype, int64_t rows, int64_t heads, int64_t head_dim,
                               int64_t kv_heads, const int64_t* table, int64_t depth,
                               const float* scale) {
  return guarded([&] {
    const OwnKeysCase c(dtype, rows, heads, head_dim, kv_heads, table, depth);
    sf::cuda::own_keys_grads({c.query(grad_out), c.query(query), c.query(out), c.lse(lse),
                              c.query(grad_query), c.own, c.grads, *scale},
                             {});
  });
}

const char* emu_fp8_pack(void* x, int dtype, int64_t rows, int64_t width, void* payload,
                         void* scale, void* row_crc, void* summary, int checksum) {
  return guarded([&] {
    sf::cuda::fp8_pack({view(x, code(dtype), {rows, width}), view(payload, sf::kU8, {rows, width}),
                        view(scale, sf::kF32, {rows}), view(row_crc, sf::kI32, {rows}),
                        view(summary, sf::kI64, {2}), checksum != 0},
                       {});
  });
}

const char* emu_fp8_unpack(void* payload, void* scale, void* y, int dtype, int64_t rows,
                           int64_t width, void* row_crc, void* summary, int checksum) {
  return guarded([&] {
    sf::cuda::fp8_unpack({view(payload, sf::kU8, {rows, width}), view(scale, sf::kF32, {rows}),
                          view(y, code(dtype), {rows, width}), view(row_crc, sf::kI32, {rows}),
                          view(summary, sf::kI64, {2}), checksum != 0},
                         {});
  });
}

const char* emu_bytes_crc(void* data, int64_t nbytes, void* part_crc, int64_t parts, void* crc) {
  return guarded([&] {
    sf::cuda::bytes_crc({view(data, sf::kU8, {nbytes}), view(part_crc, sf::kI32, {parts}),
                         view(crc, sf::kI64, {1})},
                        {});
  });
}

// lists: kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, then the four of q.
const char* emu_block_mask(void* anchors, int64_t blocks, void* cu_anchors, void* cu_seqlens,
                           int64_t samples, int64_t context, int64_t block_size, int64_t window,
                           int64_t q_tile, int64_t kv_tile, void* const* lists) {
  return guarded([&] {
    const int64_t queries = blocks * block_size;
    const int64_t rows = (queries + q_tile - 1) / q_tile;
    const int64_t columns = (context + queries + kv_tile - 1) / kv_tile;
    const auto side = [&](int first, int64_t height, int64_t width) -> sf::BlockMaskLists {
      return {view(lists[first], sf::kI32, {height}),
              view(lists[first + 1], sf::kI32, {height, width}),
              view(lists[first + 2], sf::kI32, {height}),
              view(lists[first + 3], sf::kI32, {height, width})};
    };
    sf::cuda::block_mask({view(anchors, sf::kI32, {blocks}),
                          view(cu_anchors, sf::kI32, {samples + 1}),
                          view(cu_seqlens, sf::kI32, {samples + 1}),
                          {context, block_size, window, q_tile, kv_tile}},
                         {side(0, rows, columns), side(4, columns, rows)}, {});
  });
}

}  // extern "C"
