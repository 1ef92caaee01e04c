// Products of a head's queries with its keys, and of weights with values, from panels: packed so that of a panel's columns
// those of one tile follow each other in the order in which they are read. Factors are floats or pairs of bfloat16, sums
// are float32. Included by kernels after floats.h, once per instruction set, and so without a guard; a head is a struct
// with the fields of AttentionHead (attention.h) that are used here.

#include "pairs.h"
#include "transpose.h"

// A tile's sums and their factors fit the registers: AVX-512 has 32, the others 16. Four vectors take 10 loads for 24
// multiply-adds, two take 8 for 12.
constexpr int ROWS = ATTENTION_ROWS, VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t PARTIAL_SUM = 32;  // products of one partial sum
static_assert(WIDE <= ATTENTION_MAX_LANES, "scratch memory is sized for shorter vectors");
static_assert(2 * WIDE <= ATTENTION_PADDING, "scratch memory is sized for shorter vectors");

// ----------------------------------------------------------------------------------------------------- rows and keys

// A row of queries or keys as factors, padded with zeros to a multiple of four factors (floats: to whole vectors).
template <typename Stored>
INLINE void widen_row(float* to, const Stored* from, int64_t width) {
  for (int64_t e = 0; e < width; e += WIDE) write(to + e, read(from + e, width - e));
}

INLINE void widen_row(Pair* to, const Bfloat16* from, int64_t width) {
  int64_t e = 0;
  for (; e + 2 * WIDE <= width; e += 2 * WIDE) write(to + e / 2, *reinterpret_cast<const UnalignedBits*>(from + e));
  for (; e < width; e += 8) {
    Bfloat16 eight[8] = {};
    if (e + 8 <= width)
      __builtin_memcpy(eight, from + e, sizeof eight);
    else
      for (int64_t i = 0; e + i < width; ++i) eight[i] = from[e + i];
    __builtin_memcpy(to + e / 2, eight, sizeof eight);
  }
}

// At most `most` of what is left, split so that the last part is not much shorter: short parts leave multipliers idle.
INLINE int64_t next_part(int64_t left, int64_t most) {
  return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

// Columns of the panel that starts at `start` of `count`.
INLINE int64_t panel_columns(int64_t start, int64_t count) {
  return next_part(vectors_of(count - start), VECTORS) * WIDE;
}

// Prefetches rows of the next head while this one is computed: a head's rows lie a page apart, and waiting for them would
// take as long as the products of a short head. PARTS: 2 for queries and keys, 3 with values.
template <int PARTS, template <typename, typename> class Head, typename Stored, typename Factor>
INLINE void prefetch_next_head(const Head<Stored, Factor>& head, int64_t first, int64_t rows) {
  if (head.next_query == nullptr) return;
  const int64_t part_stride = head.key - head.query, line = 64 / sizeof(Stored);
  for (int64_t r = first; r < first + rows; ++r)
    for (int64_t part = 0; part < PARTS; ++part) {
      const Stored* row = head.next_query + r * head.token_stride + part * part_stride;
      for (int64_t e = 0; e < head.width; e += line) __builtin_prefetch(row + e, 0, 2);
    }
}

// Keys as columns of panels, padded with zeros.
template <template <typename, typename> class Head, typename Stored, typename Factor>
TARGET static void pack_keys(const Head<Stored, Factor>& head) {
  // Whether a row in memory already is a row of factors.
  const bool direct = sizeof(Stored) * entries_of<Factor> == sizeof(Factor) && head.width % (16 / sizeof(Stored)) == 0;
  for (int64_t start = 0, columns; start < head.tokens; start += columns) {
    columns = panel_columns(start, head.tokens);
    Factor* panel = head.keys + start * head.width_factors;
    for (int64_t j = 0; j < columns; j += WIDE) {
      const Stored* keys = head.key + (start + j) * head.token_stride;
      const int64_t left = head.tokens - start - j;
      if (direct && left >= WIDE) {
        const int64_t row_bytes = head.token_stride * static_cast<int64_t>(sizeof(Stored));
        transpose(panel + j, columns, reinterpret_cast<const char*>(keys), row_bytes, head.width_factors);
        continue;
      }
      for (int64_t row = 0; row < WIDE; ++row) {
        Factor* to = head.rows + row * head.padded_width;
        if (row < left)
          widen_row(to, keys + row * head.token_stride, head.width);
        else
          for (int64_t d = 0; d < head.width_factors; ++d) to[d] = Factor{};
      }
      const int64_t row_bytes = head.padded_width * static_cast<int64_t>(sizeof(Factor));
      transpose(panel + j, columns, reinterpret_cast<const char*>(head.rows), row_bytes, head.width_factors);
    }
  }
}

// ------------------------------------------------------------------------------------------------------ products

INLINE Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

// to[r] ← Σ_d a[r, d] panel[d] for R rows and V vectors of columns. Sums are formed in parts: the fewer products a sum
// has, the smaller the numbers that it is rounded at, and parts of 32 err half as much as one sum of 200.
template <int R, int V, typename Factor>
INLINE void multiply(const Factor* a, int64_t a_stride, const Factor* panel, int64_t depth, float* to,
                     int64_t to_stride) {
  for (int64_t start = 0; start < depth; start += PARTIAL_SUM) {
    const int64_t end = start + PARTIAL_SUM < depth ? start + PARTIAL_SUM : depth;
    Floats sums[R][V] = {};
    for (int64_t d = start; d < end; ++d, panel += V * WIDE) {
      decltype(read(panel)) right[V];
      for (int k = 0; k < V; ++k) right[k] = read(panel + k * WIDE);
      for (int r = 0; r < R; ++r) {
        const auto left = broadcast(a[r * a_stride + d]);
        for (int k = 0; k < V; ++k) sums[r][k] = multiply_add(sums[r][k], left, right[k]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < V; ++k) {
        float* total = to + r * to_stride + k * WIDE;
        write(total, start ? read(total) + sums[r][k] : sums[r][k]);
      }
  }
}

// The same for all panels: `count` columns of `depth` factors.
template <int R, typename Factor>
TARGET static void multiply_panels(const Factor* a, int64_t a_stride, const Factor* panels, int64_t count, int64_t depth,
                                   float* to, int64_t to_stride) {
  static_assert(VECTORS == 2 || VECTORS == 4, "a case for every number of vectors");
  for (int64_t start = 0, columns; start < count; start += columns) {
    columns = panel_columns(start, count);
    const Factor* panel = panels + start * depth;
    float* sums = to + start;
    if (columns == VECTORS * WIDE)
      multiply<R, VECTORS>(a, a_stride, panel, depth, sums, to_stride);
    else if (columns == WIDE)
      multiply<R, 1>(a, a_stride, panel, depth, sums, to_stride);
    else if constexpr (VECTORS == 4) {
      if (columns == 3 * WIDE)
        multiply<R, 3>(a, a_stride, panel, depth, sums, to_stride);
      else
        multiply<R, 2>(a, a_stride, panel, depth, sums, to_stride);
    }
  }
}

template <typename Factor>
TARGET static void multiply_rows(int64_t rows, const Factor* a, int64_t a_stride, const Factor* panels, int64_t count,
                                 int64_t depth, float* to, int64_t to_stride) {
  static_assert(ROWS == 6, "a case for every number of rows");
  switch (rows) {
    case 1: return multiply_panels<1>(a, a_stride, panels, count, depth, to, to_stride);
    case 2: return multiply_panels<2>(a, a_stride, panels, count, depth, to, to_stride);
    case 3: return multiply_panels<3>(a, a_stride, panels, count, depth, to, to_stride);
    case 4: return multiply_panels<4>(a, a_stride, panels, count, depth, to, to_stride);
    case 5: return multiply_panels<5>(a, a_stride, panels, count, depth, to, to_stride);
    default: return multiply_panels<6>(a, a_stride, panels, count, depth, to, to_stride);
  }
}
