#include "text_maps.h"

#include <algorithm>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "text_maps_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t TOKENS_PER_UNIT = 8 * MAP_ROWS;  // of one image, which a thread takes at a time

template <typename Stored>
void add_maps(const Tensor& alpha, const Tensor& value, const Tensor& basis, const OptionalTensor& heads,
              const Tensor& out) {
  const int64_t images = out.shape[0], tokens = out.shape[1];
  const int64_t alpha_image = alpha.strides[0], value_image = value.strides[0];
  TextMaps<Stored> shape = {};
  shape.alpha = alpha.as<const float>();
  shape.alpha_head = alpha.strides[1];
  shape.alpha_token = alpha.strides[2];
  shape.value = value.as<const Stored>();
  shape.value_token = value.strides[1];
  shape.value_head = value.strides[2];
  shape.basis = basis.as<const float>();
  shape.heads = heads ? heads->as<const int64_t>() : nullptr;
  shape.count = heads ? heads->shape[0] : value.shape[2];
  shape.width = value.shape[3];
  shape.texts = out.shape[2];
  shape.padded = basis.shape[2];
  shape.out = out.as<float>();
  shape.row_stride = (shape.width + MAP_MAX_COLUMNS - 1) / MAP_MAX_COLUMNS * MAP_MAX_COLUMNS;
  const auto kernel = PICK(text_maps<Stored>);
  const int64_t parts = (tokens + TOKENS_PER_UNIT - 1) / TOKENS_PER_UNIT, floats = MAP_ROWS * shape.row_stride;
  in_parallel("text_maps", images * parts, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<float>(floats));
    if (!scratch) return false;
    TextMaps<Stored> part = shape;
    part.rows = scratch.take<float>(floats);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / parts;
      part.alpha = shape.alpha + image * alpha_image;
      part.value = shape.value + image * value_image;
      part.out = shape.out + image * tokens * shape.texts;
      part.begin = unit % parts * TOKENS_PER_UNIT;
      part.end = std::min(tokens, part.begin + TOKENS_PER_UNIT);
      kernel(part);
    }
    return true;
  });
}

}  // namespace

Reasons text_maps_unsupported_reasons(const Tensor& alpha, const Tensor& value, const Tensor& text_basis,
                                      const Tensor& out, const OptionalTensor& heads) {
  Checks checks;
  checks.readable({{"alpha", &alpha}, {"value", &value}, {"text_basis", &text_basis}, {"out", &out}});
  if (!checks.readable({{"heads", pointer_to(heads)}}).passed()) return checks.reasons();
  checks.dtype("alpha", alpha, STORED).dtype("value", value, STORED).dtype("text_basis", text_basis, STORED);
  return checks.dtype("out", out, {Dtype::float32}).reasons();
}

Reasons layered_text_maps_unsupported_reasons(const Tensor& alpha, const std::vector<Tensor>& values,
                                              const Tensor& text_basis, const OptionalTensor& heads) {
  Checks checks;
  const auto name = [](size_t layer) { return "values[" + std::to_string(layer) + "]"; };
  checks.readable({{"alpha", &alpha}, {"text_basis", &text_basis}, {"heads", pointer_to(heads)}});
  for (size_t layer = 0; layer < values.size(); ++layer)
    if (!values[layer].unreadable.empty()) checks.readable({{name(layer).c_str(), &values[layer]}});
  if (!checks.passed()) return checks.reasons();
  checks.dtype("alpha", alpha, STORED).dtype("text_basis", text_basis, STORED);
  for (size_t layer = 0; layer < values.size(); ++layer)
    checks.dtype(name(layer).c_str(), values[layer], STORED);
  return checks.reasons();
}

Reasons text_maps_from_tokens_unsupported_reasons(const Tensor& alpha, const Tensor& tokens, const Tensor& value_weight,
                                                  const Tensor& value_bias, const Tensor& text_basis, const Tensor& out) {
  const Checks::Named all[] = {{"alpha", &alpha},           {"tokens", &tokens},         {"value_weight", &value_weight},
                               {"value_bias", &value_bias}, {"text_basis", &text_basis}, {"out", &out}};
  Checks checks;
  for (const auto& named : all) checks.readable({named});
  if (!checks.passed()) return checks.reasons();
  for (const auto& [name, tensor] : all)
    checks.dtype(name, *tensor, {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float64});
  return checks.reasons();
}

void text_maps(const Tensor& alpha, const Tensor& value, const Tensor& basis, const OptionalTensor& heads,
               const Tensor& out) {
  Checks checks;
  checks.readable({{"alpha", &alpha}, {"value", &value}, {"basis", &basis}, {"heads", pointer_to(heads)}, {"out", &out}});
  checks.raise("text_maps");
  checks.shape("value", value, {ANY, ANY, ANY, ANY}).shape("out", out, {ANY, ANY, ANY}).raise("text_maps");
  const int64_t images = value.shape[0], tokens = value.shape[1], count = value.shape[2], width = value.shape[3];
  const int64_t texts = out.shape[2], padded = (texts + MAP_MAX_COLUMNS - 1) / MAP_MAX_COLUMNS * MAP_MAX_COLUMNS;
  checks.dtype("alpha", alpha, {Dtype::float32}).shape("alpha", alpha, {images, count, tokens});
  checks.dtype("value", value, STORED).last_axis_contiguous("value", value);
  checks.dtype("basis", basis, {Dtype::float32}).shape("basis", basis, {count, width, padded}).contiguous("basis", basis);
  checks.dtype("out", out, {Dtype::float32}).shape("out", out, {images, tokens, texts}).contiguous("out", out);
  if (heads) {
    checks.dtype("heads", *heads, {Dtype::int64}).shape("heads", *heads, {ANY}).contiguous("heads", *heads);
    checks.raise("text_maps");
    const auto* head = heads->as<const int64_t>();
    for (int64_t i = 0; i < heads->shape[0]; ++i)
      if (head[i] < 0 || head[i] >= count)
        checks.require(false, "there is no head " + std::to_string(head[i]) + " of " + std::to_string(count));
  }
  checks.raise("text_maps");
  if (out.numel() == 0 || width == 0 || (heads ? heads->shape[0] : count) == 0) return;
  with_stored(value.dtype, [&](auto* stored) {
    add_maps<std::remove_pointer_t<decltype(stored)>>(alpha, value, basis, heads, out);
  });
}

}  // namespace clipfast
