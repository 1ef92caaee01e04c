#include "attention.h"

#include <atomic>
#include <cmath>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "attention_kernel.h"
#define KERNEL_USES_BF16
#include "each_isa.h"

namespace clipfast {
namespace {

std::atomic<bool> pairs_emulated{false};

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename Stored, typename Factor>
void attend(const Tensor& qkv, bool mean, const Tensor& out, float* alpha,
            void (*kernel)(const AttentionHead<Stored, Factor>&)) {
  constexpr int64_t entries = entries_of<Factor>;
  const int64_t images = qkv.shape[0], tokens = qkv.shape[1], heads = qkv.shape[3], width = qkv.shape[4];
  const int64_t image_stride = qkv.strides[0], part_stride = qkv.strides[2], head_stride = qkv.strides[3];
  const auto* first_query = qkv.as<const Stored>();
  auto* first_out = out.as<Stored>();

  AttentionHead<Stored, Factor> shape = {};
  shape.token_stride = qkv.strides[1];
  shape.tokens = tokens;
  shape.width = width;
  shape.scale = static_cast<float>(std::pow(static_cast<double>(width), -0.5) * 1.4426950408889634);
  shape.out_stride = heads * width;
  shape.mean = mean;
  shape.width_factors = rounded_up(width, 4 * entries) / entries;
  shape.token_factors = rounded_up(tokens, entries) / entries;
  shape.padded_tokens = rounded_up(tokens, ATTENTION_PADDING);
  shape.padded_width = rounded_up(width, ATTENTION_PADDING);
  const int64_t keys = shape.padded_tokens * shape.width_factors, values = shape.token_factors * shape.padded_width;
  const int64_t rows = ATTENTION_MAX_LANES * shape.padded_width, scores = ATTENTION_ROWS * shape.padded_tokens;
  const int64_t weights = entries > 1 ? scores / entries : 0, results = ATTENTION_ROWS * shape.padded_width;
  const size_t bytes = Scratch::needs<Factor>(keys) + Scratch::needs<Factor>(values) + Scratch::needs<Factor>(rows) +
                       Scratch::needs<float>(scores) + Scratch::needs<Factor>(weights) +
                       Scratch::needs<float>(results) + Scratch::needs<float>(shape.padded_tokens);
  in_parallel("attention", images * heads, 1, [=](int64_t begin, int64_t end) {
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
      return first_query + unit / heads * image_stride + unit % heads * head_stride;
    };
    for (int64_t unit = begin; unit < end; ++unit) {
      head.query = query(unit);
      head.next_query = unit + 1 < end ? query(unit + 1) : nullptr;
      head.key = head.query + part_stride;
      head.value = head.key + part_stride;
      head.out = first_out + (unit / heads * tokens * heads + unit % heads) * width;
      head.alpha = alpha == nullptr ? nullptr : alpha + unit * tokens;
      kernel(head);
    }
    return true;
  });
}

}  // namespace

Reasons attention_unsupported_reasons(const Tensor& qkv) {
  Checks checks;
  if (checks.readable({{"qkv", &qkv}}).passed()) checks.dtype("qkv", qkv, STORED);
  return checks.reasons();
}

void attention(const Tensor& qkv, bool mean, const Tensor& out, const OptionalTensor& alpha) {
  Checks checks;
  checks.readable({{"qkv", &qkv}, {"out", &out}, {"alpha", pointer_to(alpha)}}).raise("attention");
  checks.shape("qkv", qkv, {ANY, ANY, 3, ANY, ANY}).raise("attention");
  const int64_t images = qkv.shape[0], tokens = qkv.shape[1], heads = qkv.shape[3], width = qkv.shape[4];
  checks.dtype("qkv", qkv, STORED).last_axis_contiguous("qkv", qkv);
  checks.same_dtype("out", out, "qkv", qkv).shape("out", out, {images, tokens, heads, width}).contiguous("out", out);
  if (alpha)
    checks.dtype("alpha", *alpha, {Dtype::float32}).shape("alpha", *alpha, {images, heads, tokens}).contiguous("alpha", *alpha);
  checks.require(!mean || (alpha && tokens > 1), "a mean takes alpha and two tokens or more").raise("attention");
  if (out.numel() == 0) return;

  float* weights = alpha ? alpha->as<float>() : nullptr;
  if (multiplies_pairs(qkv.dtype))
    return attend(qkv, mean, out, weights, PICK_BF16(attention_head<Bfloat16, Pair>));
  with_stored(qkv.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    attend(qkv, mean, out, weights, PICK(attention_head<Stored, float>));
  });
}

bool multiplies_pairs(Dtype dtype) {
  return dtype == Dtype::bfloat16 && (isa() == Isa::avx512_bf16 || pairs_emulated);
}

bool emulate_bf16_pairs(bool enabled) { return pairs_emulated.exchange(enabled); }

}  // namespace clipfast
