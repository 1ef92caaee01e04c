#include "activation.h"

#include <algorithm>
#include <type_traits>

#include "operations.h"
#include "pool.h"

#define KERNEL "activation_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES_PER_THREAD = 16384;  // at least, or a thread costs more than it saves

template <typename From, typename To>
void activate_rows(const ActivationArguments<From, To>& all) {
  const auto kernel = PICK(activate_rows<From, To>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES_PER_THREAD / std::max<int64_t>(1, all.columns));
  in_parallel("activation", all.rows, grain, [=](int64_t begin, int64_t end) {
    ActivationArguments<From, To> part = all;
    part.from = all.from + begin * all.from_stride;
    part.to = all.to + begin * all.to_stride;
    part.rows = end - begin;
    kernel(part);
    return true;
  });
}

template <typename To>
void activate_transposed(const ActivationArguments<float, To>& all) {
  const auto kernel = PICK(activate_transposed_tile<To>);
  const int64_t tiles_per_row = (all.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t tiles = tiles_per_row * ((all.rows + TILE_ROWS - 1) / TILE_ROWS);
  const int64_t grain = ENTRIES_PER_THREAD / (TILE_ROWS * TILE_COLUMNS);
  in_parallel("activation", tiles, grain, [=](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / tiles_per_row * TILE_ROWS, column = number % tiles_per_row * TILE_COLUMNS;
      ActivationArguments<float, To> tile = all;
      tile.from = all.from + column * all.from_stride + row;
      tile.bias = all.bias == nullptr ? nullptr : all.bias + column;
      tile.rows = std::min(TILE_ROWS, all.rows - row);
      tile.columns = std::min(TILE_COLUMNS, all.columns - column);
      tile.to = all.to + row * all.to_stride + column;
      kernel(tile);
    }
    return true;
  });
}

// The first byte of a matrix and the one after its last.
std::pair<const char*, const char*> extent(const Tensor& x) {
  const auto* start = x.as<const char>();
  const int64_t last = (x.shape[0] - 1) * x.strides[0] + (x.shape[1] - 1) * x.strides[1];
  return {start, start + (last + 1) * (x.bits / 8)};
}

bool overlap(const Tensor& x, const Tensor& y) {
  const auto [x_start, x_end] = extent(x);
  const auto [y_start, y_end] = extent(y);
  return x_start < y_end && y_start < x_end;
}

}  // namespace

Activation activation_named(const std::optional<std::string>& name) {
  if (!name) return Activation::identity;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "quick_gelu") return Activation::quick_gelu;
  throw std::invalid_argument("activation: there is no activation '" + *name + "'");
}

void activate_part(const ActivationArguments<float, float>& part) { PICK(activate_rows<float, float>)(part); }

void activation(const Tensor& x, const OptionalTensor& bias, const std::optional<std::string>& activation,
                const Tensor& out) {
  Checks checks;
  checks.readable({{"x", &x}, {"bias", pointer_to(bias)}, {"out", &out}}).raise("activation");
  checks.shape("x", x, {ANY, ANY}).dtype("out", out, STORED).raise("activation");
  const int64_t rows = x.shape[0], columns = x.shape[1];
  const bool transposed = x.strides[1] != 1 && x.strides[0] == 1;
  checks.shape("out", out, {rows, columns}).last_axis_contiguous("out", out);
  if (bias)
    checks.shape("bias", *bias, {columns}).dtype("bias", *bias, {Dtype::float32}).contiguous("bias", *bias);
  if (transposed)
    checks.dtype("x", x, {Dtype::float32});
  else
    checks.last_axis_contiguous("x", x).dtype("x", x, {Dtype::float32, out.dtype});
  checks.raise("activation");
  if (rows == 0 || columns == 0) return;
  checks.require(rows == 1 || out.strides[0] >= columns, "out has rows that overlap");
  const bool in_place = !transposed && x.data == out.data && x.dtype == out.dtype && x.strides[0] == out.strides[0];
  checks.require(in_place || !overlap(x, out), "out shares memory with x").raise("activation");

  const Activation kind = activation_named(activation);
  const float* shift = bias ? bias->as<const float>() : nullptr;
  with_stored(out.dtype, [&](auto* stored) {
    using To = std::remove_pointer_t<decltype(stored)>;
    if (transposed)
      return activate_transposed(ActivationArguments<float, To>{x.as<const float>(), x.strides[1], shift, rows, columns,
                                                                kind, out.as<To>(), out.strides[0]});
    const auto run = [&](auto* typed) {
      using From = std::remove_pointer_t<decltype(typed)>;
      activate_rows(ActivationArguments<From, To>{x.as<const From>(), x.strides[0], shift, rows, columns, kind,
                                                  out.as<To>(), out.strides[0]});
    };
    return x.dtype == out.dtype ? run(stored) : run(static_cast<float*>(nullptr));
  });
}

Reasons linear_unsupported_reasons(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  Checks checks;
  if (!checks.readable({{"x", &x}, {"weight", &weight}, {"bias", pointer_to(bias)}}).passed()) return checks.reasons();
  checks.same_dtype("weight", weight, "x", x);
  if (bias) checks.same_dtype("bias", *bias, "x", x);
  return checks.reasons();
}

Reasons linear_activation_unsupported_reasons(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  Checks checks;
  if (!checks.readable({{"x", &x}, {"weight", &weight}, {"bias", &bias}}).passed()) return checks.reasons();
  checks.same_dtype("weight", weight, "x", x).same_dtype("bias", bias, "x", x);
  if (checks.passed()) checks.dtype("x", x, STORED);
  return checks.reasons();
}

}  // namespace clipfast
