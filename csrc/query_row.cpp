#include "query_row.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "query_row_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t PADDING = 16;                 // floats of the widest vector
constexpr int64_t PRODUCTS_PER_THREAD = 16384;  // at least, or a thread costs more than it saves

template <typename Stored>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& z, const Tensor& alpha) {
  struct Strides {
    int64_t image, head;
  };
  const int64_t images = key.shape[0], tokens = key.shape[1], heads = key.shape[2], width = key.shape[3];
  const auto *first_query = query.as<const float>();
  const auto *first_key = key.as<const Stored>(), *first_value = value.as<const Stored>();
  const Strides keys = {key.strides[0], key.strides[2]}, values = {value.strides[0], value.strides[2]};
  auto *first_z = z.as<float>(), *first_alpha = alpha.as<float>();
  QueryRow<Stored> shape = {};
  shape.tokens = tokens;
  shape.width = width;
  shape.scale = static_cast<float>(std::pow(static_cast<double>(width), -0.5) * 1.4426950408889634);
  shape.key_stride = key.strides[1];
  shape.value_stride = value.strides[1];
  const auto kernel = PICK(query_row<Stored>);
  const int64_t weights = tokens + PADDING;
  const int64_t grain = std::max<int64_t>(1, PRODUCTS_PER_THREAD / (2 * tokens * width));
  in_parallel("query_row", images * heads, grain, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(weights));
    if (!scratch) return false;
    QueryRow<Stored> row = shape;
    row.weights = scratch.take<float>(weights);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / heads, head = unit % heads;
      row.query = first_query + unit * width;
      row.key = first_key + image * keys.image + head * keys.head;
      row.value = first_value + image * values.image + head * values.head;
      row.z = first_z + unit * width;
      row.alpha = first_alpha + unit * tokens;
      kernel(row);
    }
    return true;
  });
}

}  // namespace

Reasons query_row_unsupported_reasons(const Tensor& query, const Tensor& key, const Tensor& value) {
  Checks checks;
  if (!checks.readable({{"query", &query}, {"key", &key}, {"value", &value}}).passed()) return checks.reasons();
  checks.dtype("query", query, STORED).dtype("key", key, STORED).dtype("value", value, STORED);
  if (checks.passed()) checks.same_dtype("value", value, "key", key);
  return checks.reasons();
}

void query_row(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& z, const Tensor& alpha) {
  Checks checks;
  checks.readable({{"query", &query}, {"key", &key}, {"value", &value}, {"z", &z}, {"alpha", &alpha}}).raise("query_row");
  checks.shape("key", key, {ANY, ANY, ANY, ANY}).raise("query_row");
  const int64_t images = key.shape[0], tokens = key.shape[1], heads = key.shape[2], width = key.shape[3];
  checks.dtype("query", query, {Dtype::float32}).shape("query", query, {images, heads, width}).contiguous("query", query);
  checks.dtype("key", key, STORED).last_axis_contiguous("key", key);
  checks.same_dtype("value", value, "key", key).shape("value", value, {images, tokens, heads, width});
  checks.last_axis_contiguous("value", value);
  checks.dtype("z", z, {Dtype::float32}).shape("z", z, {images, heads, width}).contiguous("z", z);
  checks.dtype("alpha", alpha, {Dtype::float32}).shape("alpha", alpha, {images, heads, tokens}).contiguous("alpha", alpha);
  checks.require(tokens > 0 || z.numel() == 0, "key has no tokens").raise("query_row");
  if (z.numel() == 0) return;
  with_stored(key.dtype, [&](auto* stored) {
    attend<std::remove_pointer_t<decltype(stored)>>(query, key, value, z, alpha);
  });
}

}  // namespace clipfast
