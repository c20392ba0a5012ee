#include "transport/sample_ref.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/crc32c.h"

namespace sf {
namespace {

static_assert(std::endian::native == std::endian::little, "the binary form is");

// As in store/ref.py; tests/test_store_ref_native.py compares.
constexpr int64_t kMaxDim = INT32_MAX;
constexpr int64_t kMaxU32 = UINT32_MAX;
constexpr int64_t kMaxGeneration = (int64_t{1} << 40) - 1;
constexpr int64_t kAlignBytes = 64;
constexpr std::string_view kMagic = "SFxR";
constexpr uint16_t kVersion = 1;

struct Range {
  int64_t offset;
  int64_t nbytes;
  bool operator<(const Range& other) const {
    return std::pair(offset, nbytes) < std::pair(other.offset, other.nbytes);
  }
};

bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

bool is_text(std::string_view text, size_t max_chars) {
  return within(static_cast<int64_t>(text.size()), 1, static_cast<int64_t>(max_chars)) &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

bool is_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_'; }

bool is_name(std::string_view text) {
  return !text.empty() && text.size() <= 128 && is_letter(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return is_letter(c) || (c >= '0' && c <= '9') || c == '.' || c == '-';
         });
}

bool is_offset(int64_t value) { return value >= 0 && value % kAlignBytes == 0; }

bool shape_fits(const RefTensor& tensor, int64_t num_tokens) {
  const bool is_ids = tensor.name == "input_ids";
  const bool is_mask = tensor.name == "loss_mask";
  const std::string_view dtype = kRefDtypes[static_cast<size_t>(tensor.dtype)].name;
  if ((is_ids && dtype != "int32") || (is_mask && dtype != "uint8")) return false;
  if (tensor.rank != (is_ids || is_mask ? 1 : 2)) return false;
  return tensor.shape[0] == num_tokens && (tensor.rank == 1 || within(tensor.shape[1], 0, kMaxDim));
}

// Sizes are within kMaxDim: their product, and four times one of them, cannot overflow.
bool nbytes_fit(const RefTensor& tensor) {
  const int64_t values = tensor.shape[0] * (tensor.rank == 2 ? tensor.shape[1] : 1);
  const int64_t itemsize =
      tensor.encoded() ? 1 : kRefDtypes[static_cast<size_t>(tensor.dtype)].itemsize;
  int64_t wanted = 0;
  return !__builtin_mul_overflow(values, itemsize, &wanted) && tensor.nbytes == wanted;
}

bool scales_fit(const RefTensor& tensor) {
  if (!tensor.encoded()) return tensor.num_scales == 0 && tensor.scales_offset == 0;
  const int64_t width = tensor.shape[1];
  int64_t nbytes = 0;
  return kRefDtypes[static_cast<size_t>(tensor.dtype)].encodes && tensor.rank == 2 &&
         within(tensor.num_scales, 1, width) && width % tensor.num_scales == 0 &&
         is_offset(tensor.scales_offset) &&
         !__builtin_mul_overflow(4 * tensor.num_scales, tensor.shape[0], &nbytes);
}

bool ranges_fit(std::vector<Range>* ranges, int64_t available) {
  std::sort(ranges->begin(), ranges->end());
  int64_t end = 0;
  for (const Range& range : *ranges) {
    if (range.offset < end || range.offset > available || range.nbytes > available - range.offset)
      return false;
    end = range.offset + range.nbytes;
  }
  return true;
}

class Writer {
 public:
  template <typename Field>
  void put(Field value) {
    static_assert(std::is_unsigned_v<Field>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  template <typename Field>
  void put_as(int64_t value) {
    put(static_cast<Field>(value));
  }
  void put_text(std::string_view text) {
    put(static_cast<uint16_t>(text.size()));
    out_.append(text);
  }
  std::string sealed() && {
    put(crc32c(out_.data(), out_.size()));
    return std::move(out_);
  }
  Writer() { out_.reserve(512); }
  void put_raw(std::string_view bytes) { out_.append(bytes); }

 private:
  std::string out_;
};

// Reads fields one after the other, never beyond the end: from then on `ok` is false, and all that
// is read is 0.
class Reader {
 public:
  explicit Reader(std::string_view data) : data_(data) {}

  template <typename Field>
  Field take() {
    static_assert(std::is_unsigned_v<Field>);
    Field value = 0;
    if (const auto bytes = take_raw(sizeof value); ok)
      std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  // What has no place in 63 bits is -1, which no field allows.
  int64_t take_size() {
    const auto value = take<uint64_t>();
    return value <= INT64_MAX ? static_cast<int64_t>(value) : -1;
  }
  std::string_view take_text() { return take_raw(take<uint16_t>()); }
  bool at_end() const { return ok && data_.empty(); }

  std::string_view take_raw(size_t nbytes) {
    if (nbytes > data_.size()) ok = false;
    if (!ok) return {};
    const std::string_view out = data_.substr(0, nbytes);
    data_.remove_prefix(nbytes);
    return out;
  }

  bool ok = true;

 private:
  std::string_view data_;
};

void write_tensor(const RefTensor& tensor, Writer* out) {
  out->put_text(tensor.name);
  out->put_text(kRefDtypes[static_cast<size_t>(tensor.dtype)].name);
  out->put_text(kRefEncodings[static_cast<size_t>(tensor.encoding)]);
  out->put_as<uint8_t>(tensor.rank);
  for (int i = 0; i < tensor.rank; ++i) out->put_as<uint32_t>(tensor.shape[static_cast<size_t>(i)]);
  out->put_as<uint64_t>(tensor.offset);
  out->put_as<uint64_t>(tensor.nbytes);
  out->put_as<uint8_t>(tensor.checksum.has_value());
  out->put_as<uint32_t>(tensor.checksum.value_or(0));
  out->put_as<uint32_t>(tensor.num_scales);
  out->put_as<uint64_t>(tensor.scales_offset);
}

// False if no tensor is spelled so.
bool read_tensor(Reader* in, RefTensor* out) {
  out->name = in->take_text();
  out->dtype = ref_dtype(in->take_text());
  out->encoding = ref_encoding(in->take_text());
  out->rank = in->take<uint8_t>();
  if (out->rank > kMaxRefRank) return false;
  for (int i = 0; i < out->rank; ++i) out->shape[static_cast<size_t>(i)] = in->take<uint32_t>();
  out->offset = in->take_size();
  out->nbytes = in->take_size();
  const auto has_checksum = in->take<uint8_t>();
  const auto checksum = in->take<uint32_t>();
  if (has_checksum > 1 || (has_checksum == 0 && checksum != 0)) return false;
  if (has_checksum == 1) out->checksum = checksum;
  out->num_scales = in->take<uint32_t>();
  out->scales_offset = in->take_size();
  return in->ok;
}

}  // namespace

int ref_dtype(std::string_view text) {
  const auto* const found = std::find_if(kRefDtypes.begin(), kRefDtypes.end(),
                                         [&](const RefDtype& dtype) { return dtype.name == text; });
  return found == kRefDtypes.end() ? -1 : static_cast<int>(found - kRefDtypes.begin());
}

int ref_encoding(std::string_view text) {
  const auto* const found = std::find(kRefEncodings.begin(), kRefEncodings.end(), text);
  return found == kRefEncodings.end() ? -1 : static_cast<int>(found - kRefEncodings.begin());
}

bool ref_tensor_is_valid(const RefTensor& tensor, int64_t num_tokens) {
  return within(num_tokens, 0, kMaxDim) && is_name(tensor.name) && tensor.dtype >= 0 &&
         tensor.encoding >= 0 && within(tensor.checksum.value_or(0), 0, kMaxU32) &&
         shape_fits(tensor, num_tokens) && is_offset(tensor.offset) && nbytes_fit(tensor) &&
         scales_fit(tensor);
}

bool ref_names_fit(const std::vector<RefTensor>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const RefTensor& tensor : tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  return std::adjacent_find(names.begin(), names.end()) == names.end() &&
         std::binary_search(names.begin(), names.end(), "input_ids") &&
         std::binary_search(names.begin(), names.end(), "loss_mask");
}

bool ref_is_valid(const Ref& ref) {
  if (!is_text(ref.sample_id, 512) || !is_text(ref.store, 128) || !is_text(ref.layout_hash, 64) ||
      !within(ref.slot, 0, kMaxU32) || !within(ref.generation, 1, kMaxGeneration) ||
      ref.nbytes < 0 || ref.tensors.size() > kMaxRefTensors)
    return false;
  std::vector<Range> ranges;
  ranges.reserve(2 * ref.tensors.size());
  for (const RefTensor& tensor : ref.tensors) {
    if (!ref_tensor_is_valid(tensor, ref.num_tokens)) return false;
    ranges.push_back({tensor.offset, tensor.nbytes});
    if (tensor.encoded()) ranges.push_back({tensor.scales_offset, tensor.scales_nbytes()});
  }
  return ref_names_fit(ref.tensors) && ranges_fit(&ranges, ref.nbytes);
}

std::string ref_to_bytes(const Ref& ref) {
  Writer out;
  out.put_raw(kMagic);
  out.put(kVersion);
  out.put_as<uint16_t>(static_cast<int64_t>(ref.tensors.size()));
  out.put_as<uint32_t>(ref.slot);
  out.put_as<uint32_t>(ref.num_tokens);
  out.put_as<uint64_t>(ref.generation);
  out.put_as<uint64_t>(ref.nbytes);
  for (const std::string_view text : {ref.sample_id, ref.store, ref.layout_hash})
    out.put_text(text);
  for (const RefTensor& tensor : ref.tensors) write_tensor(tensor, &out);
  return std::move(out).sealed();
}

std::optional<Ref> ref_from_bytes(std::string_view data) {
  if (data.size() < sizeof(uint32_t) || data.size() > kMaxRefBytes) return std::nullopt;
  const std::string_view body = data.substr(0, data.size() - sizeof(uint32_t));
  uint32_t crc;
  std::memcpy(&crc, body.data() + body.size(), sizeof crc);
  Reader in(body);
  if (in.take_raw(kMagic.size()) != kMagic || in.take<uint16_t>() != kVersion) return std::nullopt;
  if (crc != crc32c(body.data(), body.size())) return std::nullopt;
  Ref ref;
  const auto num_tensors = in.take<uint16_t>();
  if (num_tensors > kMaxRefTensors) return std::nullopt;
  ref.slot = in.take<uint32_t>();
  ref.num_tokens = in.take<uint32_t>();
  ref.generation = in.take_size();
  ref.nbytes = in.take_size();
  ref.sample_id = in.take_text();
  ref.store = in.take_text();
  ref.layout_hash = in.take_text();
  if (!in.ok) return std::nullopt;
  ref.tensors.resize(num_tensors);
  for (RefTensor& tensor : ref.tensors) {
    if (!read_tensor(&in, &tensor)) return std::nullopt;
  }
  if (!in.at_end() || !ref_is_valid(ref)) return std::nullopt;
  return ref;
}

}  // namespace sf
