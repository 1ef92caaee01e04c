#include "checks.h"

#include <algorithm>
#include <stdexcept>

namespace clipfast {
namespace {

// DLPack's codes of types (DLDataTypeCode).
enum TypeCode { type_int = 0, type_uint = 1, type_float = 2, type_bfloat = 4, type_complex = 5, type_bool = 6 };
constexpr uint8_t FIRST_FLOAT8 = 7;
constexpr const char* FLOAT8[] = {"float8_e3m4",   "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
                                  "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",    "float8_e8m0fnu"};
constexpr uint8_t END_FLOAT8 = FIRST_FLOAT8 + sizeof FLOAT8 / sizeof *FLOAT8;

std::string joined(const std::vector<std::string>& parts, const char* between, const char* last) {
  std::string text;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i) text += i + 1 == parts.size() ? last : between;
    text += parts[i];
  }
  return text;
}

}  // namespace

bool Tensor::is_floating_point() const {
  return type_code == type_float || type_code == type_bfloat || (type_code >= FIRST_FLOAT8 && type_code < END_FLOAT8);
}

std::string name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "torch.float32";
    case Dtype::bfloat16: return "torch.bfloat16";
    case Dtype::float16: return "torch.float16";
    case Dtype::float64: return "torch.float64";
    case Dtype::int64: return "torch.int64";
    default: return "another dtype";
  }
}

std::string dtype_name(const Tensor& tensor) {
  if (tensor.dtype != Dtype::other) return name_of(tensor.dtype);
  const std::string bits = std::to_string(tensor.bits);
  switch (tensor.type_code) {
    case type_int: return "torch.int" + bits;
    case type_uint: return "torch.uint" + bits;
    case type_float: return "torch.float" + bits;
    case type_complex: return "torch.complex" + bits;
    case type_bool: return "torch.bool";
    default: break;
  }
  const bool float8 = tensor.type_code >= FIRST_FLOAT8 && tensor.type_code < END_FLOAT8;
  return float8 ? std::string("torch.") + FLOAT8[tensor.type_code - FIRST_FLOAT8] : name_of(Dtype::other);
}

std::string text_of(const int64_t* values, int64_t count) {
  std::vector<std::string> parts;
  for (int64_t i = 0; i < count; ++i) parts.push_back(values[i] == ANY ? "?" : std::to_string(values[i]));
  return "[" + joined(parts, ", ", ", ") + "]";
}

Checks& Checks::readable(std::initializer_list<Named> tensors) {
  for (const auto& [name, tensor] : tensors)
    if (tensor != nullptr && !tensor->unreadable.empty()) reasons_.push_back(name + (" " + tensor->unreadable));
  return *this;
}

Checks& Checks::dtype(const char* name, const Tensor& tensor, std::initializer_list<Dtype> expected) {
  if (std::find(expected.begin(), expected.end(), tensor.dtype) != expected.end()) return *this;
  std::vector<std::string> names;
  for (const Dtype dtype : expected) names.push_back(name_of(dtype));
  reasons_.push_back(name + (" is " + dtype_name(tensor)) + ", expected " + joined(names, ", ", " or "));
  return *this;
}

Checks& Checks::same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  const bool same = tensor.dtype == other.dtype && tensor.type_code == other.type_code && tensor.bits == other.bits;
  if (!same) reasons_.push_back(name + (" is " + dtype_name(tensor)) + ", " + other_name + " is " + dtype_name(other));
  return *this;
}

Checks& Checks::shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  bool same = tensor.ndim == static_cast<int64_t>(expected.size());
  for (int64_t axis = 0; same && axis < tensor.ndim; ++axis) {
    const int64_t length = expected.begin()[axis];
    same = length == ANY || length == tensor.shape[axis];
  }
  if (!same)
    reasons_.push_back(name + (" has shape " + text_of(tensor.shape, tensor.ndim)) + ", expected " +
                       text_of(expected.begin(), static_cast<int64_t>(expected.size())));
  return *this;
}

Checks& Checks::contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous())
    reasons_.push_back(name + (" has strides " + text_of(tensor.strides, tensor.ndim)) + ", expected contiguous memory");
  return *this;
}

Checks& Checks::last_axis_contiguous(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.ndim - 1;
  const bool strided = last < 0 || (tensor.shape[last] > 1 && tensor.strides[last] != 1);
  if (strided && tensor.numel() != 0)
    reasons_.push_back(name + (" has strides " + text_of(tensor.strides, tensor.ndim)) +
                       ", expected a contiguous last axis");
  return *this;
}

Checks& Checks::require(bool holds, const std::string& reason) {
  if (!holds) reasons_.push_back(reason);
  return *this;
}

void Checks::raise(const char* operation) const {
  if (!passed()) throw std::invalid_argument(std::string(operation) + ": " + joined(reasons_, "; ", "; "));
}

bool overlaps_itself(const Tensor& x) {
  if (x.is_contiguous()) return false;
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int64_t axis = 0; axis < x.ndim; ++axis)
    if (x.shape[axis] > 1) axes.emplace_back(x.strides[axis], x.shape[axis]);
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;  // of the axes within
  for (const auto& [stride, length] : axes) {
    if (stride < extent) return true;
    extent += (length - 1) * stride;
  }
  return false;
}

}  // namespace clipfast
