// out[n] += Σ_h α[h, n] (v[n, h] · U[h]). Included by each_isa.h, once per instruction set.
//
// The weights scale the products, not the values, which are read where they are. Six tokens at a time meet the texts of a
// head, which stay in the cache nearest to the core.

#include "floats.h"

constexpr int ROWS = MAP_ROWS, VECTORS = 2;  // of a tile: 12 sums, which with their factors fit 16 registers
constexpr int COLUMNS = VECTORS * WIDE;
static_assert(COLUMNS <= MAP_COLUMNS_MOST, "the basis is padded for narrower tiles");

// The rows of one head as floats: where they are, or widened into scratch.
INLINE const float* floats_of(const TextMaps<float>&, const float* value, int64_t, int64_t* stride, int64_t from) {
  *stride = from;
  return value;
}

template <typename Stored>
INLINE const float* floats_of(const TextMaps<Stored>& given, const Stored* value, int64_t rows, int64_t* stride,
                              int64_t from) {
  *stride = given.row_stride;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < given.width; e += WIDE)
      write(given.rows + r * given.row_stride + e, read(value + r * from + e, given.width - e));
  return given.rows;
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
      const Floats left = each(v[r * v_stride + e]);
      for (int k = 0; k < VECTORS; ++k) sums[r][k] += left * right[k];
    }
  }
  for (int r = 0; r < ROW_COUNT; ++r) {
    const Floats weight = each(alpha[r * alpha_stride]);
    for (int k = 0; k < VECTORS; ++k) to[r][k] += weight * sums[r][k];
  }
}

template <int ROW_COUNT, typename Stored>
TARGET static void map_rows(const TextMaps<Stored>& given, int64_t first) {
  for (int64_t start = 0; start < given.texts; start += COLUMNS) {
    Floats totals[ROW_COUNT][VECTORS] = {};
    for (int64_t i = 0; i < given.count; ++i) {
      const int64_t head = given.heads == nullptr ? i : given.heads[i];
      int64_t stride;
      const Stored* value = given.value + first * given.value_token + head * given.value_head;
      const float* v = floats_of(given, value, ROW_COUNT, &stride, given.value_token);
      add_products<ROW_COUNT>(v, stride, given.basis + head * given.width * given.padded + start, given.padded,
                              given.width, given.alpha + head * given.alpha_head + first * given.alpha_token,
                              given.alpha_token, totals);
    }
    for (int r = 0; r < ROW_COUNT; ++r)
      for (int k = 0; k < VECTORS; ++k) {
        const int64_t column = start + k * WIDE, left = given.texts - column;
        if (left <= 0) break;
        float* out = given.out + (first + r) * given.texts + column;
        write(out, read(out, left) + totals[r][k], left);
      }
  }
}

template <typename Stored>
TARGET static void text_maps(const TextMaps<Stored>& given) {
  int64_t n = given.begin;
  for (; n + ROWS <= given.end; n += ROWS) map_rows<ROWS>(given, n);
  for (; n < given.end; ++n) map_rows<1>(given, n);
}
