// The program that runs under ASan + UBSan and under TSan (a Python process cannot be): every
// kernel on shapes at its edges, in two thread orders, which must give the same bits. Or, with
// the name of a planted bug, that kernel. Exit status: 0 all equal, 1 a difference, else the
// sanitizer's.
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "emu/emu.h"
#include "emu/planted_bugs.h"
#include "loss/row_stats.h"
#include "loss/soft_ce_rows.h"
#include "loss/step_sums.h"
#include "pack/block_mask.h"
#include "pack/ttt_maps.h"

namespace {

using Bytes = std::vector<unsigned char>;
constexpr sf::Device kDevice{sf::DeviceType::kCUDA, 0};

// A tensor whose heap block has its exact size, so that ASan sees the first byte past it.
struct Tensor {
  Bytes bytes;
  sf::DType dtype;
  std::vector<int64_t> shape;

  Tensor(sf::DType dtype_, std::vector<int64_t> shape_) : dtype(dtype_), shape(std::move(shape_)) {
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    bytes.resize(static_cast<size_t>(count) * sf::dtype_size(dtype), 0xee);
    bytes.shrink_to_fit();
  }
  sf::TensorView view() {
    return shape.size() == 1 ? sf::view_of(bytes.data(), dtype, {shape[0]}, kDevice)
                             : sf::view_of(bytes.data(), dtype, {shape[0], shape[1]}, kDevice);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
  size_t count(size_t size) const { return bytes.size() / size; }
};

void fill_logits(Tensor& tensor, unsigned seed) {
  for (size_t i = 0; i < tensor.count(sf::dtype_size(tensor.dtype)); ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float x = static_cast<float>(seed >> 8) / 1000000.0f - 8.0f;
    if (tensor.dtype == sf::kBF16) {
      tensor.as<sf::bf16>()[i] = sf::to_bf16(x);
    } else {
      tensor.as<float>()[i] = x;
    }
  }
}

void append(Bytes& all, Tensor& tensor) {
  all.insert(all.end(), tensor.bytes.begin(), tensor.bytes.end());
}

Bytes row_stats(sf::DType dtype, int64_t rows, int64_t vocab) {
  Tensor logits(dtype, {rows, vocab}), lse(sf::kF32, {rows}), argmax(sf::kI32, {rows});
  fill_logits(logits, 1);
  sf::cuda::row_stats(logits.view(), lse.view(), argmax.view(), {});
  Bytes all;
  append(all, lse);
  append(all, argmax);
  return all;
}

Bytes soft_ce_rows(sf::DType student, sf::DType teacher, int64_t rows, int64_t vocab) {
  Tensor z(student, {rows, vocab}), t(teacher, {2, vocab}), map(sf::kI32, {rows}),
      weight(sf::kF32, {rows}), lse(sf::kF32, {2}), loss(sf::kF32, {rows}),
      accepted(sf::kF32, {rows}), correct(sf::kU8, {rows});
  fill_logits(z, 2);
  fill_logits(t, 3);
  for (int64_t n = 0; n < rows; ++n) {
    map.as<int32_t>()[n] = n == 2 ? 9 : static_cast<int32_t>(n % 2);  // 9: out of range
    weight.as<float>()[n] = n == 1 ? 0.0f : 0.5f + static_cast<float>(n);
  }
  lse.as<float>()[0] = lse.as<float>()[1] = 20.0f;
  sf::cuda::soft_ce_rows({z.view(), t.view(), map.view(), weight.view(), lse.view(), loss.view(),
                          accepted.view(), correct.view()},
                         {});
  Bytes all;
  for (Tensor* tensor : {&z, &loss, &accepted, &correct}) append(all, *tensor);
  return all;
}

Bytes step_sums(int64_t rows, int64_t steps) {
  Tensor loss(sf::kF32, {rows}), accepted(sf::kF32, {rows}), correct(sf::kU8, {rows}),
      weight(sf::kF32, {rows}), step(sf::kI32, {rows}), sums(sf::kF64, {5, steps});
  fill_logits(loss, 4);
  fill_logits(accepted, 5);
  fill_logits(weight, 6);
  for (int64_t n = 0; n < rows; ++n) {
    correct.as<uint8_t>()[n] = n % 3 == 0;
    step.as<int32_t>()[n] = static_cast<int32_t>(n % (steps + 1));  // the last one counts nowhere
  }
  sf::cuda::step_sums(
      {loss.view(), accepted.view(), correct.view(), weight.view(), step.view(), sums.view()}, {});
  Bytes all;
  append(all, sums);
  return all;
}

Bytes ttt_maps(int64_t tokens, const std::vector<int32_t>& bounds, int64_t length) {
  Tensor mask(sf::kU8, {tokens}), cu(sf::kI32, {static_cast<int64_t>(bounds.size())}),
      counts(sf::kI64, {length + 3});
  for (int64_t t = 0; t < tokens; ++t) mask.as<uint8_t>()[t] = t * 7 % 5 < 2;
  std::memcpy(cu.bytes.data(), bounds.data(), cu.bytes.size());
  sf::cuda::ttt_counts(mask.view(), cu.view(), counts.view(), {});
  const int64_t* c = counts.as<int64_t>();
  const int64_t active = std::accumulate(c, c + length, int64_t{0});
  Tensor a(sf::kI32, {active}), parent(sf::kI32, {active - c[0]}), source(sf::kI32, {c[length]}),
      step(sf::kI32, {c[length]}), teacher(sf::kI32, {c[length]}), rows(sf::kI32, {c[length + 1]});
  sf::cuda::ttt_fill(
      mask.view(), cu.view(), counts.view(),
      {a.view(), parent.view(), source.view(), step.view(), teacher.view(), rows.view()}, {});
  Bytes all;
  for (Tensor* tensor : {&counts, &a, &parent, &source, &step, &teacher, &rows}) {
    append(all, *tensor);
  }
  return all;
}

// 5 blocks of two samples with an empty one between, which tiles and window cut anywhere.
Bytes block_mask(int64_t block_size, int64_t window, int64_t q_tile, int64_t kv_tile) {
  const int64_t context = 37, queries = 5 * block_size;
  const int64_t rows = (queries + q_tile - 1) / q_tile;
  const int64_t columns = (context + queries + kv_tile - 1) / kv_tile;
  Tensor anchors(sf::kI32, {5}), cu_anchors(sf::kI32, {4}), cu_seqlens(sf::kI32, {4});
  const int32_t places[] = {3, 19, 22, 30, 35}, per_sample[] = {0, 2, 2, 5},
                bounds[] = {0, 20, 20, 37};
  std::memcpy(anchors.bytes.data(), places, sizeof(places));
  std::memcpy(cu_anchors.bytes.data(), per_sample, sizeof(per_sample));
  std::memcpy(cu_seqlens.bytes.data(), bounds, sizeof(bounds));
  Tensor kv_num(sf::kI32, {rows}), kv(sf::kI32, {rows, columns}), full_kv_num(sf::kI32, {rows}),
      full_kv(sf::kI32, {rows, columns}), q_num(sf::kI32, {columns}), q(sf::kI32, {columns, rows}),
      full_q_num(sf::kI32, {columns}), full_q(sf::kI32, {columns, rows});
  sf::cuda::block_mask({anchors.view(),
                        cu_anchors.view(),
                        cu_seqlens.view(),
                        {context, block_size, window, q_tile, kv_tile}},
                       {{kv_num.view(), kv.view(), full_kv_num.view(), full_kv.view()},
                        {q_num.view(), q.view(), full_q_num.view(), full_q.view()}},
                       {});
  Bytes all;
  for (Tensor* tensor : {&kv_num, &kv, &full_kv_num, &full_kv, &q_num, &q, &full_q_num, &full_q}) {
    append(all, *tensor);
  }
  return all;
}

Bytes all_kernels() {
  Bytes all;
  const auto add = [&](const Bytes& bytes) { all.insert(all.end(), bytes.begin(), bytes.end()); };
  for (sf::DType dtype : {sf::kF32, sf::kBF16}) {
    // one element; below a chunk; odd rows unaligned; several warps with head and tail; two batches
    for (int64_t vocab : {1, 7, 9, 601, 1037}) add(row_stats(dtype, 3, vocab));
    for (sf::DType teacher : {sf::kF32, sf::kBF16}) {
      for (int64_t vocab : {1, 8, 67, 1032}) add(soft_ce_rows(dtype, teacher, 4, vocab));
    }
  }
  add(soft_ce_rows(sf::kF32, sf::kF32, 1, 16392));  // one chunk past what registers hold
  add(step_sums(0, 1));
  add(step_sums(300, 3));
  add(ttt_maps(13, {0, 4, 4, 13}, 3));
  add(ttt_maps(64, {0, 30, 64}, 7));  // two warps, and two tiles from step 1 on
  add(block_mask(16, 0, 32, 16));
  add(block_mask(3, 5, 1, 1));  // several warps of columns
  return all;
}

int compare_orders() {
  using sf::emu::Order;
  sf::emu::set_order(Order::kForward, 0);
  const Bytes forward = all_kernels();
  sf::emu::set_order(Order::kRandom, 7);
  const bool random_equal = all_kernels() == forward;
  std::printf("%zu bytes, random order %s\n", forward.size(), random_equal ? "equal" : "DIFFERS");
  return random_equal ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return compare_orders();
  std::vector<float> out(64);
  sf::emu::run_planted(argv[1], out.data());
  return 0;
}
