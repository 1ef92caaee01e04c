#include "weighted_rows.h"

#include <cmath>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "weighted_rows_kernel.h"
#define KERNEL_USES_BF16
#include "each_isa.h"

namespace clipfast {
namespace {

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename Stored, typename Factor>
void sum_rows(const Tensor& qkv, const Tensor& weights, const Tensor& out,
              void (*kernel)(const RowsHead<Stored, Factor>&)) {
  constexpr int64_t entries = entries_of<Factor>;
  const int64_t images = qkv.shape[0], tokens = qkv.shape[1], heads = qkv.shape[3], width = qkv.shape[4];
  const int64_t image_stride = qkv.strides[0], part_stride = qkv.strides[2], head_stride = qkv.strides[3];
  const auto* first_query = qkv.as<const Stored>();
  const auto* first_weights = weights.as<const float>();
  auto* first_out = out.as<float>();

  RowsHead<Stored, Factor> shape = {};
  shape.token_stride = qkv.strides[1];
  shape.tokens = tokens;
  shape.width = width;
  shape.scale = static_cast<float>(std::pow(static_cast<double>(width), -0.5) * 1.4426950408889634);
  shape.groups = weights.shape[1];
  shape.out_stride = heads * tokens;
  shape.width_factors = rounded_up(width, 4 * entries) / entries;
  shape.padded_tokens = rounded_up(tokens, ATTENTION_PADDING);
  shape.padded_width = rounded_up(width, ATTENTION_PADDING);
  const int64_t keys = shape.padded_tokens * shape.width_factors, rows = ATTENTION_MAX_LANES * shape.padded_width;
  const int64_t scores = ATTENTION_ROWS * shape.padded_tokens, shares = shape.groups * ATTENTION_ROWS;
  const int64_t sums = shape.groups * shape.padded_tokens;
  const size_t bytes = Scratch::needs<Factor>(keys) + Scratch::needs<Factor>(rows) + Scratch::needs<float>(scores) +
                       Scratch::needs<float>(shares) + 2 * Scratch::needs<float>(sums);
  in_parallel("weighted_rows", images * heads, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    if (!scratch) return false;
    RowsHead<Stored, Factor> head = shape;
    head.keys = scratch.take<Factor>(keys);
    head.rows = scratch.take<Factor>(rows);
    head.scores = scratch.take<float>(scores);
    head.shares = scratch.take<float>(shares);
    head.sums = scratch.take<float>(sums);
    head.totals = scratch.take<float>(sums);
    const auto query = [&](int64_t unit) {
      return first_query + unit / heads * image_stride + unit % heads * head_stride;
    };
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / heads;
      head.query = query(unit);
      head.next_query = unit + 1 < end ? query(unit + 1) : nullptr;
      head.key = head.query + part_stride;
      head.weights = first_weights + image * head.groups * tokens;
      head.out = first_out + (image * head.groups * heads + unit % heads) * tokens;
      kernel(head);
    }
    return true;
  });
}

}  // namespace

Reasons weighted_rows_unsupported_reasons(const Tensor& qkv, const Tensor& weights) {
  Checks checks;
  if (!checks.readable({{"qkv", &qkv}, {"weights", &weights}}).passed()) return checks.reasons();
  return checks.dtype("qkv", qkv, STORED).dtype("weights", weights, {Dtype::float32}).reasons();
}

void weighted_rows(const Tensor& qkv, const Tensor& weights, const Tensor& out) {
  Checks checks;
  checks.readable({{"qkv", &qkv}, {"weights", &weights}, {"out", &out}}).raise("weighted_rows");
  checks.shape("qkv", qkv, {ANY, ANY, 3, ANY, ANY}).shape("weights", weights, {ANY, ANY, ANY}).raise("weighted_rows");
  const int64_t images = qkv.shape[0], tokens = qkv.shape[1], heads = qkv.shape[3], groups = weights.shape[1];
  checks.dtype("qkv", qkv, STORED).last_axis_contiguous("qkv", qkv);
  checks.dtype("weights", weights, {Dtype::float32}).shape("weights", weights, {images, groups, tokens});
  checks.contiguous("weights", weights).dtype("out", out, {Dtype::float32});
  checks.shape("out", out, {images, groups, heads, tokens}).contiguous("out", out);
  checks.require(qkv.shape[4] > 0, "queries have no entries").raise("weighted_rows");
  if (out.numel() == 0) return;

  if (multiplies_pairs(qkv.dtype))
    return sum_rows(qkv, weights, out, PICK_BF16(weighted_rows_head<Bfloat16, Pair>));
  with_stored(qkv.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    sum_rows(qkv, weights, out, PICK(weighted_rows_head<Stored, float>));
  });
}

}  // namespace clipfast
