// out[n] += Σ_h α[h, n] (v[n, h] · U[h]). Included by each_isa.h, once per instruction set.
//
// The weights scale the products, not the values, which are read in place. Six tokens at a time are multiplied with the
// texts of a head, which stay in the L1 cache.

#include "floats.h"

constexpr int ROWS = MAP_ROWS, VECTORS = 2;  // of a tile: 12 sums and their factors fit 16 registers
constexpr int COLUMNS = VECTORS * WIDE;
static_assert(COLUMNS <= MAP_MAX_COLUMNS, "the basis is padded for tiles of at most this");

// The rows of one head as floats: in place, or widened into scratch memory.
INLINE const float* floats_of(const TextMaps<float>&, const float* value, int64_t, int64_t* stride, int64_t value_stride) {
  *stride = value_stride;
  return value;
}

template <typename Stored>
INLINE const float* floats_of(const TextMaps<Stored>& maps, const Stored* value, int64_t rows, int64_t* stride,
                              int64_t value_stride) {
  *stride = maps.row_stride;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < maps.width; e += WIDE)
      write(maps.rows + r * maps.row_stride + e, read(value + r * value_stride + e, maps.width - e));
  return maps.rows;
}

// to[r] += α[r] (v[r] · U) for a tile of texts.
template <int ROW_COUNT>
INLINE void add_products(const float* v, int64_t v_stride, const float* basis, int64_t basis_stride, int64_t width,
                         const float* alpha, int64_t alpha_stride, Floats (*to)[VECTORS]) {
  Floats sums[ROW_COUNT][VECTORS] = {};
  for (int64_t e = 0; e < width; ++e, basis += basis_stride) {
    Floats right[VECTORS];
    for (int k = 0; k < VECTORS; ++k) right[k] = read(basis + k * WIDE);
    for (int r = 0; r < ROW_COUNT; ++r) {
      const Floats left = broadcast(v[r * v_stride + e]);
      for (int k = 0; k < VECTORS; ++k) sums[r][k] += left * right[k];
    }
  }
  for (int r = 0; r < ROW_COUNT; ++r) {
    const Floats weight = broadcast(alpha[r * alpha_stride]);
    for (int k = 0; k < VECTORS; ++k) to[r][k] += weight * sums[r][k];
  }
}

template <int ROW_COUNT, typename Stored>
TARGET static void map_rows(const TextMaps<Stored>& maps, int64_t first) {
  for (int64_t start = 0; start < maps.texts; start += COLUMNS) {
    Floats totals[ROW_COUNT][VECTORS] = {};
    for (int64_t i = 0; i < maps.count; ++i) {
      const int64_t head = maps.heads == nullptr ? i : maps.heads[i];
      int64_t stride;
      const Stored* value = maps.value + first * maps.value_token + head * maps.value_head;
      const float* v = floats_of(maps, value, ROW_COUNT, &stride, maps.value_token);
      add_products<ROW_COUNT>(v, stride, maps.basis + head * maps.width * maps.padded + start, maps.padded,
                              maps.width, maps.alpha + head * maps.alpha_head + first * maps.alpha_token,
                              maps.alpha_token, totals);
    }
    for (int r = 0; r < ROW_COUNT; ++r)
      for (int k = 0; k < VECTORS; ++k) {
        const int64_t column = start + k * WIDE, left = maps.texts - column;
        if (left <= 0) break;
        float* out = maps.out + (first + r) * maps.texts + column;
        write(out, read(out, left) + totals[r][k], left);
      }
  }
}

template <typename Stored>
TARGET static void text_maps(const TextMaps<Stored>& maps) {
  int64_t n = maps.begin;
  for (; n + ROWS <= maps.end; n += ROWS) map_rows<ROWS>(maps, n);
  for (; n < maps.end; ++n) map_rows<1>(maps, n);
}
