#include "attention/own_keys.h"

#include <string>

#include "core/backends.h"
#include "core/check.h"

namespace sf {
namespace {

std::string at(const char* name, size_t j) {
  std::string out = name;
  return out.append("[").append(std::to_string(j)).append("]");
}

// The sizes that all arguments share, bound by the first of them.
struct Shapes {
  const char* op;
  Device device;
  DType dtype;
  Dim rows{"rows"}, heads{"heads"}, kv_heads{"kv_heads"}, head_dim{"head_dim"};

  Shapes(const char* op_, const TensorView& query)
      : op(op_), device(query.device), dtype(query.dtype) {
    expect(op, "query", query).dtype({kF32, kBF16});
    of_query("query", query);
    require(heads >= 1, op, "heads must be at least 1", heads);
    require(head_dim >= 1, op, "head_dim must be at least 1", head_dim);
  }

  Expect arg(std::string name, const TensorView& view, DType wanted) {
    Expect checked = expect(op, std::move(name), view);
    checked.contiguous().device(device).dtype({wanted});
    return checked;
  }

  void of_query(const char* name, const TensorView& view) {
    arg(name, view, dtype).shape({&rows, &heads, &head_dim});
  }

  void of_lse(const TensorView& view) { arg("lse", view, kF32).shape({&rows, &heads}); }

  void of_own(std::span<const OwnKeys> own) {
    require(own.size() <= kMaxOwnKeys, op, "there must be at most 63 steps of own keys",
            static_cast<int64_t>(own.size()));
    for (size_t j = 0; j < own.size(); ++j) {
      Dim own_rows{"own_rows"};
      if (own[j].rows.rank == 0) {
        own_rows.size = rows;
      } else {
        arg(at("rows", j), own[j].rows, kI64).shape({&rows});
      }
      arg(at("keys", j), own[j].keys, dtype).shape({&own_rows, &kv_heads, &head_dim});
      arg(at("values", j), own[j].values, dtype).shape({&own_rows, &kv_heads, &head_dim});
    }
    require(own.empty() || (kv_heads >= 1 && heads % kv_heads == 0), op,
            "kv_heads must divide the heads of query", kv_heads);
  }

  void of_grads(std::span<const OwnKeys> own, std::span<const OwnKeyGrads> grads) {
    require(grads.size() == own.size(), op, "there must be one gradient for each of own keys",
            static_cast<int64_t>(grads.size()));
    for (size_t j = 0; j < own.size(); ++j) {
      Dim own_rows{"own_rows", own[j].keys.shape[0]};
      arg(at("grad_keys", j), grads[j].keys, dtype).shape({&own_rows, &kv_heads, &head_dim});
      arg(at("grad_values", j), grads[j].values, dtype).shape({&own_rows, &kv_heads, &head_dim});
    }
  }
};

}  // namespace

void own_keys_merge(const OwnKeysMerge& args, Stream stream) {
  Shapes shapes("own_keys_merge", args.query);
  shapes.of_query("out", args.out);
  shapes.of_lse(args.lse);
  shapes.of_own(args.own);
  if (args.own.empty()) return;
  backend(shapes.op, shapes.device, &cpu::own_keys_merge, SF_CUDA_FN(cuda::own_keys_merge))(args,
                                                                                            stream);
}

void own_keys_grads(const OwnKeysGrads& args, Stream stream) {
  Shapes shapes("own_keys_grads", args.query);
  shapes.of_query("grad_out", args.grad_out);
  shapes.of_query("out", args.out);
  shapes.of_query("grad_query", args.grad_query);
  shapes.of_lse(args.lse);
  shapes.of_own(args.own);
  shapes.of_grads(args.own, args.grads);
  if (args.own.empty()) return;
  backend(shapes.op, shapes.device, &cpu::own_keys_grads, SF_CUDA_FN(cuda::own_keys_grads))(args,
                                                                                            stream);
}

}  // namespace sf
