#include "text_maps.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "text_maps_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t TOKENS = 8 * MAP_ROWS;  // of one image that a thread takes at a time

template <typename Stored>
int maps_of(TextMaps<Stored> shape, int64_t alpha_image, int64_t value_image, int64_t images, int64_t tokens) {
  const auto kernel = PICK(text_maps<Stored>);
  shape.row_stride = (shape.width + MAP_COLUMNS_MOST - 1) / MAP_COLUMNS_MOST * MAP_COLUMNS_MOST;
  const int64_t parts = (tokens + TOKENS - 1) / TOKENS, floats = MAP_ROWS * shape.row_stride;
  return in_parallel(images * parts, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(floats));
    if (!scratch) return false;
    TextMaps<Stored> part = shape;
    part.rows = scratch.take<float>(floats);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / parts;
      part.alpha = shape.alpha + image * alpha_image;
      part.value = shape.value + image * value_image;
      part.out = shape.out + image * tokens * shape.texts;
      part.begin = unit % parts * TOKENS;
      part.end = std::min(tokens, part.begin + TOKENS);
      kernel(part);
    }
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// out[b, n] += Σ_h α[b, h, n] (v[b, n, h] · U[h]) over `count` heads: those in `heads`, or the first where it is nullptr.
// alpha [images, heads, tokens] of float; value [images, tokens, heads, width] of a format; both with strides in elements,
// value's last axis contiguous. basis [heads, width, padded] of float, contiguous, zeros from `texts` on; padded is a
// multiple of 32. out [images, tokens, texts] of float, contiguous.
CLIPFAST_EXPORT int clipfast_text_maps(int format, const float* alpha, int64_t alpha_image, int64_t alpha_head,
                                       int64_t alpha_token, const void* value, int64_t value_image, int64_t value_token,
                                       int64_t value_head, const float* basis, const int64_t* heads, int64_t count,
                                       int64_t images, int64_t tokens, int64_t width, int64_t texts, int64_t padded,
                                       float* out) {
  return clipfast::with_format(format, [=](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    clipfast::TextMaps<Stored> shape = {};
    shape.alpha = alpha;
    shape.alpha_head = alpha_head;
    shape.alpha_token = alpha_token;
    shape.value = static_cast<const Stored*>(value);
    shape.value_token = value_token;
    shape.value_head = value_head;
    shape.basis = basis;
    shape.heads = heads;
    shape.count = count;
    shape.width = width;
    shape.texts = texts;
    shape.padded = padded;
    shape.out = out;
    return clipfast::maps_of(shape, alpha_image, value_image, images, tokens);
  });
}
