// One-line contracts of an op's arguments, with dimensions that are named once.
//
//   Dim rows{"rows"}, vocab{"vocab"};
//   expect("loss_rows", "logits", logits).dtype({kF32, kBF16}).shape({&rows, &vocab}).contiguous();
//   expect("loss_rows", "weight", weight).dtype({kF32}).shape({&rows});
//
// A Dim binds at its first use; a later tensor that differs is refused:
//   loss_rows: weight must be [rows=4] f32, got [5] f32
// Give the dtype first: the sentence about the shape then names it too.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace sf {

struct Dim {
  const char* name;
  int64_t size = -1;  // -1: not bound yet

  operator int64_t() const { return size; }
};

class Expect {
 public:
  Expect(const char* op, std::string name, const TensorView& view)
      : op_(op), name_(std::move(name)), view_(view) {}

  Expect& dtype(std::initializer_list<DType> allowed);
  Expect& shape(std::initializer_list<Dim*> dims);
  Expect& contiguous();
  Expect& device(Device wanted);

 private:
  [[noreturn]] void fail(const std::string& wanted, const std::string& got) const;
  std::string dtypes() const;

  const char* op_;
  std::string name_;
  const TensorView& view_;
  std::vector<DType> allowed_;
};

inline Expect expect(const char* op, std::string name, const TensorView& view) {
  return Expect(op, std::move(name), view);
}

// A condition that is not about one tensor's shape: "op: <wanted>, got <got>".
[[noreturn]] void fail_argument(const char* op, const std::string& wanted, const std::string& got);
inline void require(bool ok, const char* op, const char* wanted, int64_t got) {
  if (!ok) fail_argument(op, wanted, std::to_string(got));
}

}  // namespace sf
