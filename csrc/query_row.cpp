#include "query_row.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "query_row_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t PADDING = 16;      // floats of a vector, the widest instruction set's
constexpr int64_t PRODUCTS = 16384;  // fewer are not worth a thread of their own

struct Strides {
  int64_t image, token, head;
};

template <typename Stored>
int query_rows(QueryRow<Stored> shape, const float* query, const Stored* key, Strides keys, const Stored* value,
               Strides values, int64_t images, int64_t heads, float* z, float* alpha) {
  const auto kernel = PICK(query_row<Stored>);
  shape.key_stride = keys.token;
  shape.value_stride = values.token;
  const int64_t weights = shape.tokens + PADDING;
  const int64_t grain = std::max<int64_t>(1, PRODUCTS / (2 * shape.tokens * shape.width));
  return in_parallel(images * heads, grain, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(weights));
    if (!scratch) return false;
    QueryRow<Stored> row = shape;
    row.weights = scratch.take<float>(weights);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / heads, head = unit % heads;
      row.query = query + unit * shape.width;
      row.key = key + image * keys.image + head * keys.head;
      row.value = value + image * values.image + head * values.head;
      row.z = z + unit * shape.width;
      row.alpha = alpha + unit * shape.tokens;
      kernel(row);
    }
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// Attention of one query per image and head. query [images, heads, width] of float, contiguous; key and value [images,
// tokens, heads, width] of a format, with strides in elements and their last axis contiguous; z [images, heads, width]
// and alpha [images, heads, tokens] of float, contiguous. tokens and width are at least 1.
CLIPFAST_EXPORT int clipfast_query_row(int format, const float* query, const void* key, int64_t key_image,
                                       int64_t key_token, int64_t key_head, const void* value, int64_t value_image,
                                       int64_t value_token, int64_t value_head, int64_t images, int64_t tokens,
                                       int64_t heads, int64_t width, double scale, float* z, float* alpha) {
  return clipfast::with_format(format, [=](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    clipfast::QueryRow<Stored> shape = {};
    shape.tokens = tokens;
    shape.width = width;
    shape.scale = static_cast<float>(scale * 1.4426950408889634);
    return clipfast::query_rows(shape, query, static_cast<const Stored*>(key), {key_image, key_token, key_head},
                                static_cast<const Stored*>(value), {value_image, value_token, value_head}, images, heads,
                                z, alpha);
  });
}
