// A bias and an activation: the arguments of the kernels of all instruction sets.
#pragma once

#include <optional>
#include <string>

#include "formats.h"

namespace clipfast {

constexpr int64_t TILE_ROWS = 32, TILE_COLUMNS = 64;  // that are transposed at a time: 8 KB of float32, in the L1 cache

enum class Activation { gelu, gelu_tanh, quick_gelu, identity };

template <typename From, typename To>
struct ActivationArguments {
  const From* from;  // [rows, columns], rows from_stride apart; where it is transposed, columns from_stride apart
  int64_t from_stride;
  const float* bias;  // [columns], added first; nullptr for none
  int64_t rows;
  int64_t columns;
  Activation activation;
  To* to;  // [rows, columns], rows to_stride apart; may be `from`
  int64_t to_stride;
};

// Throws std::invalid_argument where there is no activation of that name; none is `identity`.
Activation activation_named(const std::optional<std::string>& name);

// to ← f(from + bias), contiguous columns, on the thread that calls.
void activate_part(const ActivationArguments<float, float>& part);

}  // namespace clipfast
