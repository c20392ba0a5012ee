#include <array>
#include <string>
#include <vector>

#include "attention/own_keys.h"
#include "attention/own_keys_cpu_impl.h"
#include "core/check.h"
#include "core/isa.h"

namespace sf::cpu {

const OwnKeysKernels kOwnKeysPlain = kKernels;

namespace {

const OwnKeysKernels& kernels() {
  switch (isa()) {
    case Isa::kAvx512:
      return kOwnKeysAvx512;
    case Isa::kAvx2:
      return kOwnKeysAvx2;
    case Isa::kPlain:
      break;
  }
  return kOwnKeysPlain;
}

OwnShape shape_of(const TensorView& query, std::span<const OwnKeys> own, float scale) {
  return {query.shape[1], own[0].keys.shape[1], query.shape[2], static_cast<int64_t>(own.size()),
          scale};
}

const int64_t* rows_of(const OwnKeys& own) {
  return own.rows.rank == 0 ? nullptr : own.rows.as<const int64_t>();
}

void check_rows(const char* op, std::span<const OwnKeys> own, int64_t num_queries) {
  for (size_t j = 0; j < own.size(); ++j) {
    const int64_t* rows = rows_of(own[j]);
    if (rows == nullptr) continue;
    const int64_t own_rows = own[j].keys.shape[0];
    for (int64_t n = 0; n < num_queries; ++n) {
      if (rows[n] > (n > 0 ? rows[n - 1] : -1) && rows[n] < own_rows) continue;
      fail_argument(
          op,
          "rows[" + std::to_string(j) + "] must ascend in [0, " + std::to_string(own_rows) + ")",
          std::to_string(rows[n]) + " at row " + std::to_string(n));
    }
  }
}

// Where each own row of query n begins, for tensors [own_rows, kv_heads, head_dim].
template <class T>
using Pointers = std::array<T*, kMaxOwnKeys>;

int64_t own_row(const OwnKeys& own, int64_t n) {
  const int64_t* rows = rows_of(own);
  return rows == nullptr ? n : rows[n];
}

constexpr int64_t kRowsPerTask = 16;  // a task of fewer would not repay its start
constexpr int64_t kSerialElements = 1 << 16;

// row(n, scratch) for all rows.
template <class Row>
void for_each_row(const OwnShape& shape, int64_t num_rows, Row row) {
  const int64_t work = num_rows * shape.heads * shape.head_dim * shape.depth;
#pragma omp parallel for schedule(static) if (work > kSerialElements)
  for (int64_t begin = 0; begin < num_rows; begin += kRowsPerTask) {
    thread_local std::vector<float> scratch;
    const auto needed = static_cast<size_t>(own_keys_scratch(shape.heads, shape.depth));
    if (scratch.size() < needed) scratch.resize(needed);
    const int64_t end = begin + kRowsPerTask < num_rows ? begin + kRowsPerTask : num_rows;
    for (int64_t n = begin; n < end; ++n) row(n, scratch.data());
  }
}

template <class T, class Kernel>
void merge(const OwnKeysMerge& args, const OwnShape& shape, Kernel kernel) {
  const int64_t width = shape.heads * shape.head_dim, own_width = shape.kv_heads * shape.head_dim;
  for_each_row(shape, args.query.shape[0], [&](int64_t n, float* scratch) {
    Pointers<const T> keys, values;
    for (int64_t j = 0; j < shape.depth; ++j) {
      const int64_t offset = own_row(args.own[j], n) * own_width;
      keys[j] = args.own[j].keys.template as<const T>() + offset;
      values[j] = args.own[j].values.template as<const T>() + offset;
    }
    kernel(shape,
           {args.query.template as<const T>() + n * width, args.out.template as<T>() + n * width,
            args.lse.template as<float>() + n * shape.heads, keys.data(), values.data()},
           scratch);
  });
}

// Rows of a gradient that lie between those of the queries.
void clear_gaps(const TensorView& grad, const OwnKeys& own, int64_t num_queries) {
  const auto row_bytes =
      static_cast<size_t>(grad.shape[1] * grad.shape[2]) * dtype_size(grad.dtype);
  int64_t begin = 0;
  for (int64_t n = 0; n <= num_queries; ++n) {
    const int64_t end = n < num_queries ? own_row(own, n) : grad.shape[0];
    if (begin < end) {
      std::memset(grad.as<char>() + static_cast<size_t>(begin) * row_bytes, 0,
                  static_cast<size_t>(end - begin) * row_bytes);
    }
    begin = end + 1;
  }
}

template <class T, class Kernel>
void grads(const OwnKeysGrads& args, const OwnShape& shape, Kernel kernel) {
  const int64_t width = shape.heads * shape.head_dim, own_width = shape.kv_heads * shape.head_dim;
  for_each_row(shape, args.query.shape[0], [&](int64_t n, float* scratch) {
    Pointers<const T> keys, values;
    Pointers<T> grad_keys, grad_values;
    for (int64_t j = 0; j < shape.depth; ++j) {
      const int64_t offset = own_row(args.own[j], n) * own_width;
      keys[j] = args.own[j].keys.template as<const T>() + offset;
      values[j] = args.own[j].values.template as<const T>() + offset;
      grad_keys[j] = args.grads[j].keys.template as<T>() + offset;
      grad_values[j] = args.grads[j].values.template as<T>() + offset;
    }
    kernel(
        shape,
        {args.grad_out.template as<const T>() + n * width,
         args.query.template as<const T>() + n * width, args.out.template as<const T>() + n * width,
         args.lse.template as<const float>() + n * shape.heads,
         args.grad_query.template as<T>() + n * width, keys.data(), values.data(), grad_keys.data(),
         grad_values.data()},
        scratch);
  });
}

}  // namespace

void own_keys_merge(const OwnKeysMerge& args, Stream) {
  check_rows("own_keys_merge", args.own, args.query.shape[0]);
  const OwnShape shape = shape_of(args.query, args.own, args.scale);
  if (args.query.dtype == kBF16) {
    merge<bf16>(args, shape, kernels().merge_b16);
  } else {
    merge<float>(args, shape, kernels().merge_f32);
  }
}

void own_keys_grads(const OwnKeysGrads& args, Stream) {
  check_rows("own_keys_grads", args.own, args.query.shape[0]);
  const OwnShape shape = shape_of(args.query, args.own, args.scale);
  for (size_t j = 0; j < args.own.size(); ++j) {
    clear_gaps(args.grads[j].keys, args.own[j], args.query.shape[0]);
    clear_gaps(args.grads[j].values, args.own[j], args.query.shape[0]);
  }
  if (args.query.dtype == kBF16) {
    grads<bf16>(args, shape, kernels().grads_b16);
  } else {
    grads<float>(args, shape, kernels().grads_f32);
  }
}

}  // namespace sf::cpu
