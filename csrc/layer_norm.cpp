#include "layer_norm.h"

#include <algorithm>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "layer_norm_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES_PER_THREAD = 16384;  // at least, or a thread costs more than it saves

// The rows of a tensor [..., width]: row (i, j) starts at i · outer_stride + j · inner_stride.
struct Rows {
  int64_t outer = 1, inner = 1;
  int64_t outer_stride = 0, inner_stride = 0;
};

// False where the rows do not lie at two strides.
bool find_rows(const Tensor& x, Rows* rows) {
  *rows = {};
  if (x.ndim < 2) return true;
  rows->inner = x.shape[x.ndim - 2];
  rows->inner_stride = x.strides[x.ndim - 2];
  for (int64_t axis = x.ndim - 3; axis >= 0; --axis) {
    const int64_t length = x.shape[axis], stride = x.strides[axis];
    if (length == 1) continue;
    if (rows->outer == 1)
      rows->outer_stride = stride;
    else if (stride != rows->outer_stride * rows->outer)
      return false;
    rows->outer *= length;
  }
  return true;
}

// Whether writing one entry of x may change another entry of delta, which is read in place if it is contiguous.
bool changes_with(const Tensor& x, const Tensor& delta) {
  const auto distance = (reinterpret_cast<intptr_t>(delta.data) - reinterpret_cast<intptr_t>(x.data)) / (x.bits / 8);
  const int64_t count = x.numel();
  if (count == 0 || distance <= -count || (distance >= count && x.is_contiguous())) return false;
  if (distance == 0 && std::equal(x.strides, x.strides + x.ndim, delta.strides)) return false;
  int64_t extent = 1;
  for (int64_t axis = 0; axis < x.ndim; ++axis) extent += (x.shape[axis] - 1) * x.strides[axis];
  return distance < extent && delta.is_contiguous();
}

Checks check(const Tensor& x, const Tensor* delta, const Tensor& weight, const Tensor& bias) {
  Checks checks;
  if (!checks.readable({{"x", &x}, {"delta", delta}, {"weight", &weight}, {"bias", &bias}}).passed()) return checks;
  checks.dtype("x", x, STORED).dtype("weight", weight, STORED).dtype("bias", bias, STORED);
  if (delta != nullptr) checks.same_dtype("delta", *delta, "x", x);
  checks.require(x.ndim > 0, "x has no axes");
  if (!checks.passed() || x.numel() == 0) return checks;
  Rows rows;
  const int64_t last = x.ndim - 1;
  const bool contiguous = x.shape[last] == 1 || x.strides[last] == 1;
  if (!contiguous || overlaps_itself(x) || !find_rows(x, &rows))
    checks.require(false, "x has strides " + text_of(x.strides, x.ndim) +
                              ", expected a contiguous last axis and rows at two strides that do not overlap");
  if (delta != nullptr) checks.require(delta->ndim == x.ndim, "delta has another number of axes than x");
  if (checks.passed() && delta != nullptr) checks.require(!changes_with(x, *delta), "delta shares memory with x");
  return checks;
}

template <typename Stored>
void normalize(const NormRows<Stored>& all, int64_t rows) {
  const auto kernel = PICK(norm_rows<Stored>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES_PER_THREAD / all.width);
  in_parallel("add_layer_norm", rows, grain, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(all.width + NORM_MAX_STEP));
    if (!scratch) return false;
    NormRows<Stored> part = all;
    part.row = scratch.take<float>(all.width + NORM_MAX_STEP);
    part.begin = begin;
    part.end = end;
    kernel(part);
    return true;
  });
}

}  // namespace

Reasons add_layer_norm_unsupported_reasons(const Tensor& x, const OptionalTensor& delta, const Tensor& weight,
                                           const Tensor& bias) {
  return check(x, pointer_to(delta), weight, bias).reasons();
}

void add_layer_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, const Tensor& bias, double eps,
                    const Tensor& out) {
  Checks checks = check(x, pointer_to(delta), weight, bias);
  checks.readable({{"out", &out}}).raise("add_layer_norm");
  const int64_t width = x.shape[x.ndim - 1];
  checks.dtype("weight", weight, {Dtype::float32}).shape("weight", weight, {width}).contiguous("weight", weight);
  checks.dtype("bias", bias, {Dtype::float32}).shape("bias", bias, {width}).contiguous("bias", bias);
  const auto like_x = [&](const char* name, const Tensor& tensor) {
    checks.same_dtype(name, tensor, "x", x).contiguous(name, tensor);
    const bool same = tensor.ndim == x.ndim && std::equal(x.shape, x.shape + x.ndim, tensor.shape);
    if (!same) checks.require(false, std::string(name) + " has another shape than x");
  };
  like_x("out", out);
  if (delta) like_x("delta", *delta);
  checks.raise("add_layer_norm");
  if (x.numel() == 0) return;

  Rows layout;
  find_rows(x, &layout);
  with_stored(x.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    NormRows<Stored> rows = {};
    rows.x = x.as<Stored>();
    rows.outer_stride = layout.outer_stride;
    rows.inner_stride = layout.inner_stride;
    rows.inner = layout.inner;
    rows.delta = delta ? delta->as<const Stored>() : nullptr;
    rows.weight = weight.as<const float>();
    rows.bias = bias.as<const float>();
    rows.out = out.as<Stored>();
    rows.width = width;
    rows.eps = eps;
    normalize(rows, layout.outer * layout.inner);
  });
}

}  // namespace clipfast
