// A SampleRef as plain data, and its binary form. store/ref.py has the layout of the bytes, the
// meaning of the limits, and says what is wrong with what is refused here.
//
// All texts here are ASCII: refs with others are left to Python, which knows what is printable.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sf {

struct RefDtype {
  std::string_view name;
  int64_t itemsize;
  bool encodes;  // with fp8_e4m3_row
};

inline constexpr std::array<RefDtype, 6> kRefDtypes = {{{"float32", 4, true},
                                                        {"bfloat16", 2, true},
                                                        {"float16", 2, true},
                                                        {"int64", 8, false},
                                                        {"int32", 4, false},
                                                        {"uint8", 1, false}}};
inline constexpr std::array<std::string_view, 2> kRefEncodings = {"none", "fp8_e4m3_row"};
inline constexpr int kMaxRefRank = 2;
inline constexpr int kMaxRefTensors = 256;
inline constexpr int64_t kMaxRefBytes = 128 << 10;

// The place of `text` in kRefDtypes or kRefEncodings; -1 if it is not there.
int ref_dtype(std::string_view text);
int ref_encoding(std::string_view text);

// Where the texts lie is the maker's business.
struct RefTensor {
  std::string_view name;
  int dtype = -1;
  int encoding = -1;
  int rank = 0;
  std::array<int64_t, kMaxRefRank> shape{};
  int64_t offset = 0;
  int64_t nbytes = 0;
  std::optional<int64_t> checksum;
  int64_t num_scales = 0;
  int64_t scales_offset = 0;

  bool encoded() const { return encoding == 1; }
  int64_t scales_nbytes() const { return 4 * num_scales * shape[0]; }  // of a valid one
};

struct Ref {
  std::string_view sample_id;
  std::string_view store;
  std::string_view layout_hash;
  int64_t slot = 0;
  int64_t generation = 0;
  int64_t num_tokens = 0;
  int64_t nbytes = 0;
  std::vector<RefTensor> tensors;
};

// Whether one of so many tokens can be true of a store: its own fields, not where others lie. Any
// values may come; nothing here overflows.
bool ref_tensor_is_valid(const RefTensor& tensor, int64_t num_tokens);

// Whether each is there once, and a prompt's two among them.
bool ref_names_fit(const std::vector<RefTensor>& tensors);

// Whether it can be true of a store. As above.
bool ref_is_valid(const Ref& ref);

// Of a valid one.
std::string ref_to_bytes(const Ref& ref);

// Its inverse; the texts lie in `data`. Nothing unless it is to the bit what ref_to_bytes makes of
// a valid ref.
std::optional<Ref> ref_from_bytes(std::string_view data);

}  // namespace sf
