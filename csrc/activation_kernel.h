// f(x + b), every value read and written once. Included by each_isa.h, once per instruction set.

#include "floats.h"
#include "transpose.h"

template <Activation ACTIVATION>
INLINE Floats activate(Floats x) {
  if (ACTIVATION == Activation::identity) return x;
  if (ACTIVATION == Activation::gelu)
    return broadcast(0.5f) * x * (broadcast(1) + error_function(x * broadcast(0.707106781f)));
  // ½ x (1 + tanh u) = x sigmoid(2u) with u = √(2/π) (x + 0.044715 x³)
  const Floats u = ACTIVATION == Activation::quick_gelu
                       ? x * broadcast(1.702f)
                       : x * (broadcast(1.59576912f) + broadcast(0.0713548163f) * x * x);
  return x / (broadcast(1) + exponential(-u));
}

template <Activation ACTIVATION, typename From, typename To>
TARGET static void activate_rows_by(const ActivationArguments<From, To>& all) {
  const int64_t columns = all.columns, whole = columns / WIDE * WIDE;
  for (int64_t row = 0; row < all.rows; ++row) {
    const From* from = all.from + row * all.from_stride;
    To* to = all.to + row * all.to_stride;
    if (all.bias == nullptr)
      for (int64_t i = 0; i < whole; i += WIDE) write(to + i, activate<ACTIVATION>(read(from + i)));
    else
      for (int64_t i = 0; i < whole; i += WIDE)
        write(to + i, activate<ACTIVATION>(read(from + i) + read(all.bias + i)));
    if (whole < columns) {
      Floats value = read(from + whole, columns - whole);
      if (all.bias != nullptr) value += read(all.bias + whole, columns - whole);
      write(to + whole, activate<ACTIVATION>(value), columns - whole);
    }
  }
}

template <typename From, typename To>
TARGET static void activate_rows(const ActivationArguments<From, To>& all) {
  switch (all.activation) {
    case Activation::gelu:
      return activate_rows_by<Activation::gelu>(all);
    case Activation::gelu_tanh:
      return activate_rows_by<Activation::gelu_tanh>(all);
    case Activation::quick_gelu:
      return activate_rows_by<Activation::quick_gelu>(all);
    default:
      return activate_rows_by<Activation::identity>(all);
  }
}

// One tile of at most TILE_ROWS × TILE_COLUMNS, whose columns are contiguous in `from`.
template <typename To>
TARGET static void activate_transposed_tile(const ActivationArguments<float, To>& tile) {
  alignas(64) float rows[TILE_ROWS * TILE_COLUMNS];
  const int64_t stride = tile.from_stride, fours = tile.rows / 4 * 4;
  int64_t vectors = 0;
  for (; vectors + WIDE <= tile.columns; vectors += WIDE) {
    const char* columns = reinterpret_cast<const char*>(tile.from + vectors * stride);
    transpose(rows + vectors, TILE_COLUMNS, columns, stride * static_cast<int64_t>(sizeof(float)), fours);
  }
  for (int64_t row = 0; row < tile.rows; ++row)
    for (int64_t i = row < fours ? vectors : 0; i < tile.columns; ++i)
      rows[row * TILE_COLUMNS + i] = tile.from[i * stride + row];
  ActivationArguments<float, To> transposed = tile;
  transposed.from = rows;
  transposed.from_stride = TILE_COLUMNS;
  activate_rows(transposed);
}
