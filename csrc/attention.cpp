#include "attention.h"

#include <atomic>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "attention_kernel.h"
#define KERNEL_USES_BF16
#include "each_isa.h"

namespace clipfast {
namespace {

std::atomic<bool> pairs_everywhere{false};

// What clipfast_attention is given.
struct Attention {
  const void* qkv;
  int64_t image_stride, token_stride, part_stride, head_stride;
  int64_t images, tokens, heads, width;
  double scale;
  void* out;
  float* alpha;
  bool mean;
};

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename Stored, typename Factor>
int run(const Attention& given, void (*kernel)(const AttentionHead<Stored, Factor>&)) {
  constexpr int64_t entries = entries_of<Factor>;
  AttentionHead<Stored, Factor> shape = {};
  shape.token_stride = given.token_stride;
  shape.tokens = given.tokens;
  shape.width = given.width;
  shape.scale = static_cast<float>(given.scale * 1.4426950408889634);
  shape.out_stride = given.heads * given.width;
  shape.mean = given.mean;
  shape.width_factors = rounded_up(given.width, 4 * entries) / entries;
  shape.token_factors = rounded_up(given.tokens, entries) / entries;
  shape.padded_tokens = rounded_up(given.tokens, ATTENTION_PADDING);
  shape.padded_width = rounded_up(given.width, ATTENTION_PADDING);
  const int64_t keys = shape.padded_tokens * shape.width_factors, values = shape.token_factors * shape.padded_width;
  const int64_t rows = ATTENTION_LANES_MOST * shape.padded_width, scores = ATTENTION_ROWS * shape.padded_tokens;
  const int64_t weights = entries > 1 ? scores / entries : 0, results = ATTENTION_ROWS * shape.padded_width;
  const size_t bytes = Scratch::needs<Factor>(keys) + Scratch::needs<Factor>(values) + Scratch::needs<Factor>(rows) +
                       Scratch::needs<float>(scores) + Scratch::needs<Factor>(weights) +
                       Scratch::needs<float>(results) + Scratch::needs<float>(shape.padded_tokens);
  return in_parallel(given.images * given.heads, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    if (!scratch) return false;
    AttentionHead<Stored, Factor> head = shape;
    head.keys = scratch.take<Factor>(keys);
    head.values = scratch.take<Factor>(values);
    head.rows = scratch.take<Factor>(rows);
    head.scores = scratch.take<float>(scores);
    if constexpr (std::is_same_v<Factor, float>)
      head.weights = head.scores;
    else
      head.weights = scratch.take<Factor>(weights);
    head.results = scratch.take<float>(results);
    head.total = scratch.take<float>(shape.padded_tokens);
    const auto query = [&](int64_t unit) {
      const int64_t image = unit / given.heads, h = unit % given.heads;
      return static_cast<const Stored*>(given.qkv) + image * given.image_stride + h * given.head_stride;
    };
    for (int64_t unit = begin; unit < end; ++unit) {
      head.query = query(unit);
      head.next_query = unit + 1 < end ? query(unit + 1) : nullptr;
      head.key = head.query + given.part_stride;
      head.value = head.key + given.part_stride;
      const int64_t image = unit / given.heads, h = unit % given.heads;
      head.out = static_cast<Stored*>(given.out) + (image * given.tokens * given.heads + h) * given.width;
      head.alpha = given.alpha == nullptr ? nullptr : given.alpha + unit * given.tokens;
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
  using namespace clipfast;
  const Attention given = {qkv, image_stride, token_stride, part_stride, head_stride, images, tokens,
                           heads, width, scale, out, alpha, mean != 0};
  if (format == bfloat16 && (isa() == Isa::avx512_bf16 || pairs_everywhere))
    return run(given, PICK_BF16(attention_head<Bfloat16, Pair>));
  return with_format(format, [&](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    return run(given, PICK(attention_head<Stored, float>));
  });
}

// For tests: computes attention of bfloat16 by pairs on every instruction set, with the instructions of AVX512-BF16
// emulated where they are missing, or where they are there alone. Returns what was so before.
CLIPFAST_EXPORT int clipfast_pairs_everywhere(int wanted) { return clipfast::pairs_everywhere.exchange(wanted != 0); }
