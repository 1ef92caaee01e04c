#include "layer_norm.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "layer_norm_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES = 16384;  // fewer are not worth a thread of their own

template <typename Stored>
int norms_of(const NormRows<Stored>& whole, int64_t rows) {
  const auto kernel = PICK(norm_rows<Stored>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES / whole.width);
  return in_parallel(rows, grain, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(whole.width + NORM_STEP_MOST));
    if (!scratch) return false;
    NormRows<Stored> part = whole;
    part.row = scratch.take<float>(whole.width + NORM_STEP_MOST);
    part.begin = begin;
    part.end = end;
    kernel(part);
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// x ← x + delta and out ← its LayerNorm. x [outer, inner, width] of a format, with strides in elements and its last axis
// contiguous; delta (or nullptr) and out the same, contiguous; weight and bias [width] of float. inner and width are at
// least 1.
CLIPFAST_EXPORT int clipfast_layer_norm(int format, void* x, int64_t outer_stride, int64_t inner_stride, int64_t outer,
                                        int64_t inner, int64_t width, const void* delta, const float* weight,
                                        const float* bias, double eps, void* out) {
  return clipfast::with_format(format, [=](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    clipfast::NormRows<Stored> rows = {};
    rows.x = static_cast<Stored*>(x);
    rows.outer_stride = outer_stride;
    rows.inner_stride = inner_stride;
    rows.inner = inner;
    rows.delta = static_cast<const Stored*>(delta);
    rows.weight = weight;
    rows.bias = bias;
    rows.out = static_cast<Stored*>(out);
    rows.width = width;
    rows.eps = eps;
    return clipfast::norms_of(rows, outer * inner);
  });
}
