#include "rotate.h"

#include <algorithm>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "rotate_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES_PER_THREAD = 16384;  // at least, or a thread costs more than it saves

Checks check(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  Checks checks;
  if (!checks.readable({{"x", &x}, {"cos", &cos}, {"sin", &sin}}).passed()) return checks;
  checks.dtype("x", x, STORED).dtype("cos", cos, STORED).dtype("sin", sin, STORED);
  if (!checks.shape("x", x, {ANY, ANY, ANY, ANY, ANY}).passed()) return checks;
  checks.require(x.shape[4] % 2 == 0, "x has an odd number of entries").last_axis_contiguous("x", x);
  if (overlaps_itself(x))
    checks.require(false, "x has strides " + text_of(x.strides, x.ndim) + ", expected entries that do not overlap");
  return checks;
}

}  // namespace

Reasons rotate_unsupported_reasons(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return check(x, cos, sin).reasons();
}

void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool halves) {
  Checks checks = check(x, cos, sin);
  checks.raise("rotate");
  const int64_t tokens = x.shape[1], heads = x.shape[3], width = x.shape[4];
  checks.shape("cos", cos, {ANY, ANY, ANY}).raise("rotate");
  const int64_t tables = cos.shape[0];
  checks.require(tables == 1 || tables == heads, "cos is neither of one head nor of all");
  for (const auto& [name, table] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}})
    checks.dtype(name, *table, {Dtype::float32}).shape(name, *table, {tables, tokens, width}).contiguous(name, *table);
  checks.raise("rotate");
  if (x.numel() == 0) return;

  with_stored(x.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    RotateTokens<Stored> all = {};
    all.x = x.as<Stored>();
    all.image_stride = x.strides[0];
    all.token_stride = x.strides[1];
    all.part_stride = x.strides[2];
    all.head_stride = x.strides[3];
    all.tokens = tokens;
    all.parts = x.shape[2];
    all.heads = heads;
    all.width = width;
    all.cos = cos.as<const float>();
    all.sin = sin.as<const float>();
    all.table_stride = tables == 1 ? 0 : tokens * width;
    const auto kernel = halves ? PICK(rotate_tokens<true, Stored>) : PICK(rotate_tokens<false, Stored>);
    const int64_t grain = std::max<int64_t>(1, ENTRIES_PER_THREAD / (all.parts * heads * width));
    in_parallel("rotate", x.shape[0] * tokens, grain, [=](int64_t begin, int64_t end) {
      RotateTokens<Stored> part = all;
      part.begin = begin;
      part.end = end;
      kernel(part);
      return true;
    });
  });
}

}  // namespace clipfast
