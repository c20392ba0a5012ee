// The CUDA launchers as C functions for ctypes, run by the emulator. Each returns nullptr, or the
// error's text (valid until the next call). dtype codes are those of sf::DType.
#include <exception>
#include <string>

#include "emu/emu.h"
#include "emu/planted_bugs.h"
#include "loss/row_stats.h"
#include "loss/soft_ce_rows.h"
#include "loss/step_sums.h"
#include "pack/block_mask.h"
#include "pack/ttt_maps.h"

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

const char* emu_soft_ce_rows(void* logits, int dtype, void* teacher, int teacher_dtype,
                             int64_t rows, int64_t teacher_rows, int64_t vocab,
                             void* row_to_teacher, void* weight, void* teacher_lse, void* loss,
                             void* accepted, void* correct) {
  return guarded([&] {
    sf::cuda::soft_ce_rows(
        {view(logits, code(dtype), {rows, vocab}),
         view(teacher, code(teacher_dtype), {teacher_rows, vocab}),
         view(row_to_teacher, sf::kI32, {rows}), view(weight, sf::kF32, {rows}),
         view(teacher_lse, sf::kF32, {teacher_rows}), view(loss, sf::kF32, {rows}),
         view(accepted, sf::kF32, {rows}), view(correct, sf::kU8, {rows})},
        {});
  });
}

const char* emu_step_sums(void* loss, void* accepted, void* correct, void* weight, void* step,
                          int64_t rows, void* sums, int64_t num_steps) {
  return guarded([&] {
    sf::cuda::step_sums({view(loss, sf::kF32, {rows}), view(accepted, sf::kF32, {rows}),
                         view(correct, sf::kU8, {rows}), view(weight, sf::kF32, {rows}),
                         view(step, sf::kI32, {rows}), view(sums, sf::kF64, {5, num_steps})},
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
