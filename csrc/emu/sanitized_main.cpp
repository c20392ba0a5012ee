// The program that runs under ASan + UBSan and under TSan (a Python process cannot be): every
// kernel on shapes at its edges, in two thread orders, which must give the same bits. Or, with
// the name of a planted bug, that kernel. Exit status: 0 all equal, 1 a difference, else the
// sanitizer's.
#include <cstdio>
#include <cstring>
#include <numeric>
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
    if (shape.size() == 3) {
      return sf::view_of(bytes.data(), dtype, {shape[0], shape[1], shape[2]}, kDevice);
    }
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

struct Path {
  sf::cuda::Access access;
  unsigned cluster;
  int64_t vocab, rest;  // rest: columns of the teacher that the draft does not have
};

// Row 1 has weight 0, row 2 no teacher. The teacher's normaliser is given where it has no rest.
Bytes loss_rows(sf::DType student, sf::DType teacher, sf::LossKind kind, const Path& path) {
  constexpr int64_t kRows = 3;
  const bool hard = kind == sf::LossKind::kHardCe, lambda = kind == sf::LossKind::kLkLambda;
  const bool has_lse = !hard && path.rest == 0;
  Tensor z(student, {kRows, path.vocab}), t(teacher, {2, path.vocab + path.rest}),
      map(sf::kI32, {kRows}), weight(sf::kF32, {kRows}), kl_weight(sf::kF32, {kRows}),
      lse(sf::kF32, {2}), label(sf::kI32, {2}), loss(sf::kF32, {kRows}),
      accepted(sf::kF32, {kRows}), correct(sf::kU8, {kRows}), top_prob(sf::kF32, {kRows}),
      entropy(sf::kF32, {kRows});
  fill_logits(z, 2);
  fill_logits(t, 3);
  for (int64_t n = 0; n < kRows; ++n) {
    map.as<int32_t>()[n] = n == 2 ? 9 : static_cast<int32_t>(n % 2);
    weight.as<float>()[n] = n == 1 ? 0.0f : 0.5f + static_cast<float>(n);
    kl_weight.as<float>()[n] = 0.25f;
  }
  lse.as<float>()[0] = lse.as<float>()[1] = 20.0f;
  label.as<int32_t>()[0] = 0;
  label.as<int32_t>()[1] = static_cast<int32_t>(path.vocab - 1);
  const sf::TensorView none;
  const sf::LossSpec spec{kind, 1.5f, 0.3f, hard ? 0.0f : 0.5f, true};
  sf::cuda::loss_rows_planned(
      {z.view(), hard ? none : t.view(), map.view(), weight.view(), has_lse ? lse.view() : none,
       none, label.view(), lambda ? kl_weight.view() : none, loss.view(), accepted.view(),
       correct.view(), top_prob.view(), entropy.view()},
      spec, {path.access, path.cluster}, {});
  Bytes all;
  for (Tensor* tensor : {&z, &loss, &accepted, &correct, &top_prob, &entropy}) append(all, *tensor);
  return all;
}

Bytes all_loss_rows() {
  using sf::cuda::Access;
  // one element; ragged; a chunk; one chunk for the first block of two; several warps of each block
  constexpr Path kPaths[] = {
      {Access::kScalar, 1, 1, 0},       {Access::kScalar, 1, 67, 5},  {Access::kStreamed, 1, 8, 0},
      {Access::kStreamed, 1, 1032, 16}, {Access::kHeld, 1, 1032, 0},  {Access::kHeld, 1, 1032, 24},
      {Access::kHeld, 2, 8, 0},         {Access::kHeld, 2, 2056, 24}, {Access::kHeld, 4, 1032, 0}};
  Bytes all;
  const auto add = [&](const Bytes& bytes) { all.insert(all.end(), bytes.begin(), bytes.end()); };
  // One kind per kernel, f32 and bf16 in turn: TSan takes a tenth of a second per row.
  unsigned turn = 0;
  for (sf::LossKind kind : {sf::LossKind::kHardCe, sf::LossKind::kSoftCe, sf::LossKind::kLkLambda,
                            sf::LossKind::kJsd}) {
    for (const Path& path : kPaths) {
      const sf::DType dtype = ++turn % 2 == 0 ? sf::kF32 : sf::kBF16;
      add(loss_rows(dtype, dtype, kind, path));
    }
  }
  add(loss_rows(sf::kF32, sf::kBF16, sf::LossKind::kSoftCe, kPaths[3]));
  add(loss_rows(sf::kBF16, sf::kF32, sf::LossKind::kJsd, kPaths[3]));
  return all;
}

Bytes step_sums(int64_t rows, int64_t steps) {
  Tensor loss(sf::kF32, {rows}), accepted(sf::kF32, {rows}), correct(sf::kU8, {rows}),
      top_prob(sf::kF32, {rows}), entropy(sf::kF32, {rows}), weight(sf::kF32, {rows}),
      step(sf::kI32, {rows}), sums(sf::kF64, {7, steps});
  unsigned seed = 4;
  for (Tensor* tensor : {&loss, &accepted, &top_prob, &entropy, &weight}) {
    fill_logits(*tensor, seed++);
  }
  for (int64_t n = 0; n < rows; ++n) {
    correct.as<uint8_t>()[n] = n % 3 == 0;
    step.as<int32_t>()[n] = static_cast<int32_t>(n % (steps + 1));  // the last one counts nowhere
  }
  sf::cuda::step_sums({loss.view(), accepted.view(), correct.view(), top_prob.view(),
                       entropy.view(), weight.view(), step.view(), sums.view()},
                      {});
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

// Sample k has lengths[k] tokens and one feature; every second one is encoded.
Bytes pack_samples(sf::DType dtype, const std::vector<int64_t>& lengths, int64_t width,
                   int64_t groups) {
  const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  std::vector<Tensor> held;
  held.reserve(4 * lengths.size());
  std::vector<sf::PackSource> sources;
  const auto hold = [&](sf::DType kind, std::vector<int64_t> shape) {
    return held.emplace_back(kind, std::move(shape)).view();
  };
  for (size_t k = 0; k < lengths.size(); ++k) {
    const bool encoded = k % 2 == 1;
    sources.push_back({hold(sf::kI32, {lengths[k]}),
                       hold(sf::kU8, {lengths[k]}),
                       {hold(encoded ? sf::kU8 : dtype, {lengths[k], width})},
                       {encoded ? hold(sf::kF32, {lengths[k], groups}) : sf::TensorView{}}});
  }
  Tensor ids(sf::kI64, {total}), mask(sf::kU8, {total}), positions(sf::kI64, {total}),
      cu(sf::kI32, {static_cast<int64_t>(lengths.size()) + 1}), feature(dtype, {total, width});
  sf::cuda::pack_samples(
      sources, {ids.view(), mask.view(), positions.view(), cu.view(), {feature.view()}}, {});
  Bytes all;
  for (Tensor* tensor : {&ids, &mask, &positions, &cu, &feature}) append(all, *tensor);
  return all;
}

// Step j has 2 (j + 1) rows more than there are queries, before, among and after theirs; step 1
// none, and no index.
Bytes own_keys(sf::DType dtype, int64_t rows, int64_t kv_heads, int64_t group, int64_t head_dim,
               int depth) {
  const std::vector<int64_t> shape{rows, kv_heads * group, head_dim};
  Tensor query(dtype, shape), out(dtype, shape), grad_out(dtype, shape), grad_query(dtype, shape),
      lse(sf::kF32, {rows, kv_heads * group});
  unsigned seed = 8;
  for (Tensor* tensor : {&query, &out, &grad_out, &grad_query, &lse}) fill_logits(*tensor, seed++);
  std::vector<Tensor> keys, values, indices, grad_keys, grad_values;
  for (int j = 0; j < depth; ++j) {
    const int64_t more = j == 1 ? 0 : 2 * (j + 1);
    const std::vector<int64_t> own{rows + more, kv_heads, head_dim};
    for (auto* tensors : {&keys, &values, &grad_keys, &grad_values}) {
      tensors->emplace_back(dtype, own);
      fill_logits(tensors->back(), seed++);
    }
    indices.emplace_back(sf::kI64, std::vector<int64_t>{rows});
    for (int64_t n = 0; n < rows; ++n) {
      indices[j].as<int64_t>()[n] = n + 1 + (n > rows / 2 ? j : 0);
    }
  }
  std::vector<sf::OwnKeys> own;
  std::vector<sf::OwnKeyGrads> grads;
  for (int j = 0; j < depth; ++j) {
    own.push_back(
        {keys[j].view(), values[j].view(), j == 1 ? sf::TensorView{} : indices[j].view()});
    grads.push_back({grad_keys[j].view(), grad_values[j].view()});
  }
  sf::cuda::own_keys_merge({query.view(), out.view(), lse.view(), own, 0.01f}, {});
  sf::cuda::own_keys_grads(
      {grad_out.view(), query.view(), out.view(), lse.view(), grad_query.view(), own, grads, 0.01f},
      {});
  Bytes all;
  for (Tensor* tensor : {&out, &lse, &grad_query}) append(all, *tensor);
  for (auto* tensors : {&grad_keys, &grad_values}) {
    for (Tensor& tensor : *tensors) append(all, tensor);
  }
  return all;
}

Bytes fp8_rows(sf::DType dtype, int64_t rows, int64_t width) {
  Tensor x(dtype, {rows, width}), payload(sf::kU8, {rows, width}), scale(sf::kF32, {rows}),
      row_crc(sf::kI32, {rows}), packed(sf::kI64, {2}), y(dtype, {rows, width}),
      unpacked(sf::kI64, {2});
  fill_logits(x, 8);
  sf::cuda::fp8_pack({x.view(), payload.view(), scale.view(), row_crc.view(), packed.view()}, {});
  sf::cuda::fp8_unpack({payload.view(), scale.view(), y.view(), row_crc.view(), unpacked.view()},
                       {});
  Bytes all;
  for (Tensor* tensor : {&payload, &scale, &packed, &y, &unpacked}) append(all, *tensor);
  return all;
}

Bytes bytes_crc(int64_t nbytes) {
  const int64_t parts = (nbytes + sf::kCrcPartBytes - 1) / sf::kCrcPartBytes;
  Tensor data(sf::kU8, {nbytes}), part_crc(sf::kI32, {parts}), crc(sf::kI64, {1});
  sf::cuda::bytes_crc({data.view(), part_crc.view(), crc.view()}, {});
  Bytes all;
  append(all, crc);
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
  }
  add(all_loss_rows());
  add(step_sums(0, 1));
  add(step_sums(300, 3));
  add(ttt_maps(13, {0, 4, 4, 13}, 3));
  add(ttt_maps(64, {0, 30, 64}, 7));  // two warps, and two tiles from step 1 on
  for (sf::DType dtype : {sf::kF32, sf::kBF16}) {
    add(pack_samples(dtype, {3, 5, 0, 1}, 32, 2));  // vectors, but for the ragged ends of ids
    add(pack_samples(dtype, {2, 3}, 6, 3));         // element by element
    add(pack_samples(dtype, {}, 4, 1));
    add(own_keys(dtype, 0, 2, 2, 16, 1));  // only rows that no query uses
    add(own_keys(dtype, 7, 1, 4, 64, 3));
    add(own_keys(dtype, 5, 3, 1, 80, 2));  // the last lanes of a team have nothing to do
    add(own_keys(dtype, 3, 2, 2, 256, 6));
    // one byte; a chunk; scalar, several warps; vectors, two rounds and two blocks of rows
    for (int64_t width : {1, 16, 1037, 4352}) add(fp8_rows(dtype, 9, width));
  }
  // nothing; one byte; a whole part; two parts, the second byte by byte; vectors to the end
  for (int64_t nbytes : {0, 1, 65536, 65536 + 1037, 2 * 65536 + 4112}) add(bytes_crc(nbytes));
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
