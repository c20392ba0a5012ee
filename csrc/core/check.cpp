#include "core/check.h"

#include "core/error.h"

namespace sf {

void Expect::fail(const std::string& wanted, const std::string& got) const {
  fail_argument(op_, name_ + " must be " + wanted, got);
}

std::string Expect::dtypes() const {
  std::string out;
  for (DType d : allowed_) out.append(out.empty() ? "" : " or ").append(dtype_name(d));
  return out;
}

Expect& Expect::dtype(std::initializer_list<DType> allowed) {
  allowed_ = allowed;
  for (DType d : allowed) {
    if (d == view_.dtype) return *this;
  }
  fail(dtypes(), view_.str());
}

Expect& Expect::shape(std::initializer_list<Dim*> dims) {
  bool ok = view_.rank == static_cast<int>(dims.size());
  int axis = 0;
  for (Dim* dim : dims) {
    if (!ok) break;
    const int64_t size = view_.shape[axis++];
    ok = dim->size < 0 || dim->size == size;
  }
  if (!ok) {
    std::string wanted = "[";
    for (Dim* dim : dims) {
      wanted.append(wanted.size() == 1 ? "" : ", ").append(dim->name);
      if (dim->size >= 0) wanted.append("=").append(std::to_string(dim->size));
    }
    wanted.append("]");
    if (!allowed_.empty()) wanted.append(" ").append(dtypes());
    fail(wanted, view_.str());
  }
  axis = 0;
  for (Dim* dim : dims) dim->size = view_.shape[axis++];
  return *this;
}

Expect& Expect::contiguous() {
  if (!view_.contiguous()) {
    std::string strides;
    for (int i = 0; i < view_.rank; ++i) {
      strides += (i ? ", " : "") + std::to_string(view_.strides[i]);
    }
    fail("contiguous", view_.str() + " with strides [" + strides + "]");
  }
  return *this;
}

Expect& Expect::device(Device wanted) {
  if (view_.device != wanted) fail("on " + wanted.str(), view_.device.str());
  return *this;
}

void fail_argument(const char* op, const std::string& wanted, const std::string& got) {
  throw ArgumentError(std::string(op).append(": ").append(wanted).append(", got ").append(got));
}

}  // namespace sf
