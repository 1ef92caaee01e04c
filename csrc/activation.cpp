#include "activation.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "activation_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES = 16384;  // fewer are not worth a thread of their own

template <typename From, typename To>
int activation_of(const Activated<From, To>& whole) {
  const auto kernel = PICK(activated<From, To>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES / std::max<int64_t>(1, whole.columns));
  return in_parallel(whole.rows, grain, [=](int64_t begin, int64_t end) {
    Activated<From, To> part = whole;
    part.from = whole.from + begin * whole.from_stride;
    part.to = whole.to + begin * whole.to_stride;
    part.rows = end - begin;
    kernel(part);
    return true;
  });
}

template <typename To>
int activation_turned(const Activated<float, To>& whole) {
  const auto kernel = PICK(activated_tile<To>);
  const int64_t across = (whole.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t tiles = across * ((whole.rows + TILE_ROWS - 1) / TILE_ROWS);
  return in_parallel(tiles, ENTRIES / (TILE_ROWS * TILE_COLUMNS), [=](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / across * TILE_ROWS, column = number % across * TILE_COLUMNS;
      Activated<float, To> tile = whole;
      tile.from = whole.from + column * whole.from_stride + row;
      tile.bias = whole.bias == nullptr ? nullptr : whole.bias + column;
      tile.rows = std::min(TILE_ROWS, whole.rows - row);
      tile.columns = std::min(TILE_COLUMNS, whole.columns - column);
      tile.to = whole.to + row * whole.to_stride + column;
      kernel(tile);
    }
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// to ← f(from + bias), both [rows, columns] with rows a stride (in elements) apart; bias [columns] of float or nullptr.
// from is of to's format or of float; where they are the same, `to` may be `from`.
CLIPFAST_EXPORT int clipfast_activation(int from_format, const void* from, int64_t from_stride, const float* bias,
                                        int64_t rows, int64_t columns, int activation, int to_format, void* to,
                                        int64_t to_stride) {
  return clipfast::with_format(to_format, [=](auto* of) {
    using To = std::remove_pointer_t<decltype(of)>;
    const auto run = [=](auto* typed) {
      using From = std::remove_pointer_t<decltype(typed)>;
      return clipfast::activation_of(clipfast::Activated<From, To>{
          static_cast<const From*>(from), from_stride, bias, rows, columns, activation, static_cast<To*>(to), to_stride});
    };
    return from_format == to_format ? run(of) : run(static_cast<float*>(nullptr));
  });
}

// The same of floats of which columns lie a stride apart; `to` is other memory.
CLIPFAST_EXPORT int clipfast_activation_turned(const float* from, int64_t from_stride, const float* bias, int64_t rows,
                                               int64_t columns, int activation, int to_format, void* to,
                                               int64_t to_stride) {
  return clipfast::with_format(to_format, [=](auto* of) {
    using To = std::remove_pointer_t<decltype(of)>;
    return clipfast::activation_turned(clipfast::Activated<float, To>{from, from_stride, bias, rows, columns, activation,
                                                                      static_cast<To*>(to), to_stride});
  });
}
