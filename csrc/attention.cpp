#include "attention.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "attention_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

int64_t whole_panels(int64_t count) {
  return (count + ATTENTION_COLUMNS_MOST - 1) / ATTENTION_COLUMNS_MOST * ATTENTION_COLUMNS_MOST;
}

template <typename Stored>
int attention_of(AttentionHead<Stored> shape, const Stored* qkv, int64_t image_stride, int64_t part_stride,
                 int64_t head_stride, int64_t images, int64_t heads, Stored* out, float* alpha, bool mean) {
  shape.padded_tokens = whole_panels(shape.tokens);
  shape.padded_width = whole_panels(shape.width);
  shape.out_stride = heads * shape.width;
  shape.mean = mean;
  const int64_t keys = shape.padded_tokens * shape.width, values = shape.tokens * shape.padded_width;
  const int64_t queries = ATTENTION_ROWS * shape.padded_width, weights = ATTENTION_ROWS * shape.padded_tokens;
  const size_t bytes = Scratch::needs<float>(keys) + Scratch::needs<float>(values) + Scratch::needs<float>(queries) +
                       Scratch::needs<float>(weights) + Scratch::needs<float>(shape.padded_tokens);
  const auto kernel = PICK(attention_head<Stored>);
  return in_parallel(images * heads, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    if (!scratch) return false;
    AttentionHead<Stored> head = shape;
    head.keys = scratch.take<float>(keys);
    head.values = scratch.take<float>(values);
    head.queries = scratch.take<float>(queries);
    head.weights = scratch.take<float>(weights);
    head.total = scratch.take<float>(shape.padded_tokens);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / heads, h = unit % heads;
      head.query = qkv + image * image_stride + h * head_stride;
      head.key = head.query + part_stride;
      head.value = head.key + part_stride;
      head.out = out + (image * shape.tokens * heads + h) * shape.width;
      head.alpha = alpha == nullptr ? nullptr : alpha + unit * shape.tokens;
      kernel(head);
    }
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// Attention of every image and head, one thread each. qkv [images, tokens, 3, heads, width] of a format, with strides in
// elements and its last axis contiguous; out [images, tokens, heads, width] contiguous; alpha [images, heads, tokens] of
// float, contiguous: the first query's weights, or with `mean` the mean of the others', or nullptr. tokens and width are
// at least 1, and 2 tokens for a mean.
CLIPFAST_EXPORT int clipfast_attention(int format, const void* qkv, int64_t image_stride, int64_t token_stride,
                                       int64_t part_stride, int64_t head_stride, int64_t images, int64_t tokens,
                                       int64_t heads, int64_t width, double scale, void* out, float* alpha, int mean) {
  return clipfast::with_format(format, [=](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    clipfast::AttentionHead<Stored> shape = {};
    shape.token_stride = token_stride;
    shape.tokens = tokens;
    shape.width = width;
    shape.scale = static_cast<float>(scale);
    return clipfast::attention_of(shape, static_cast<const Stored*>(qkv), image_stride, part_stride, head_stride, images,
                                  heads, static_cast<Stored*>(out), alpha, mean != 0);
  });
}
