// A bias and an activation: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t TILE_ROWS = 32, TILE_COLUMNS = 64;  // of what is turned at a time, in the nearest cache

// As kernels/native_linear.py numbers them.
enum Activation { gelu = 0, gelu_tanh = 1, quick_gelu = 2, identity = 3 };

template <typename From, typename To>
struct Activated {
  const From* from;  // [rows, columns], rows from_stride apart; or turned, columns that far apart
  int64_t from_stride;
  const float* bias;  // [columns], added before; nullptr for nothing
  int64_t rows;
  int64_t columns;
  int activation;
  To* to;  // [rows, columns], rows to_stride apart; may be `from`
  int64_t to_stride;
};

}  // namespace clipfast
