// f(x + b), every value read and written once. Included by each_isa.h, once per instruction set.

#include "floats.h"
#include "transpose.h"

template <int ACTIVATION>
INLINE Floats activate(Floats x) {
  if (ACTIVATION == identity) return x;
  if (ACTIVATION == gelu) return each(0.5f) * x * (each(1) + error_function(x * each(0.707106781f)));
  // ½ x (1 + tanh u) = x sigmoid(2u) with u = √(2/π) (x + 0.044715 x³)
  const Floats u = ACTIVATION == quick_gelu ? x * each(1.702f) : x * (each(1.59576912f) + each(0.0713548163f) * x * x);
  return x / (each(1) + exponential(-u));
}

template <int ACTIVATION, typename From, typename To>
TARGET static void activate_rows(const Activated<From, To>& given) {
  const int64_t columns = given.columns, whole = columns / WIDE * WIDE;
  for (int64_t row = 0; row < given.rows; ++row) {
    const From* from = given.from + row * given.from_stride;
    To* to = given.to + row * given.to_stride;
    if (given.bias == nullptr)
      for (int64_t i = 0; i < whole; i += WIDE) write(to + i, activate<ACTIVATION>(read(from + i)));
    else
      for (int64_t i = 0; i < whole; i += WIDE)
        write(to + i, activate<ACTIVATION>(read(from + i) + read(given.bias + i)));
    if (whole < columns) {
      Floats value = read(from + whole, columns - whole);
      if (given.bias != nullptr) value += read(given.bias + whole, columns - whole);
      write(to + whole, activate<ACTIVATION>(value), columns - whole);
    }
  }
}

template <typename From, typename To>
TARGET static void activated(const Activated<From, To>& given) {
  switch (given.activation) {
    case gelu:
      return activate_rows<gelu>(given);
    case gelu_tanh:
      return activate_rows<gelu_tanh>(given);
    case quick_gelu:
      return activate_rows<quick_gelu>(given);
    default:
      return activate_rows<identity>(given);
  }
}

// One tile, of which `from` has the columns one after the other.
template <typename To>
TARGET static void activated_tile(const Activated<float, To>& tile) {
  alignas(64) float turned[TILE_ROWS * TILE_COLUMNS];
  const int64_t stride = tile.from_stride, fours = tile.rows / 4 * 4;
  int64_t vectors = 0;
  for (; vectors + WIDE <= tile.columns; vectors += WIDE) {
    const char* columns = reinterpret_cast<const char*>(tile.from + vectors * stride);
    transpose(turned + vectors, TILE_COLUMNS, columns, stride * static_cast<int64_t>(sizeof(float)), fours);
  }
  for (int64_t row = 0; row < tile.rows; ++row)
    for (int64_t i = row < fours ? vectors : 0; i < tile.columns; ++i)
      turned[row * TILE_COLUMNS + i] = tile.from[i * stride + row];
  Activated<float, To> upright = tile;
  upright.from = turned;
  upright.from_stride = TILE_COLUMNS;
  activated(upright);
}
