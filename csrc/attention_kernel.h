// Attention of one head of one image, with the weights of the pooled token. Included by each_isa.h, once per
// instruction set.
//
// Six queries at a time are multiplied with all keys: their weights (14 KB for 577 tokens) stay in the L1 cache, keys and
// values (300 KB) in L2, so an online softmax over blocks of keys would gain nothing. The pooled token's row is one of
// those that are computed anyway. Its weights are those of float32, whatever the factors are; pairs multiply values with
// weights rounded to bfloat16, as torch's own attention does.
//
// Keys and values are packed into panels: of a panel's columns those of one tile follow each other in the order in which
// they are read. Factors are floats or pairs of bfloat16, sums are float32.

#include "floats.h"
#include "pairs.h"
#include "transpose.h"

// A tile's sums and their factors fit the registers: AVX-512 has 32, the others 16. Four vectors take 10 loads for 24
// multiply-adds, two take 8 for 12.
constexpr int ROWS = ATTENTION_ROWS, VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t PARTIAL_SUM = 32;  // products of one partial sum
static_assert(WIDE <= ATTENTION_MAX_LANES, "scratch memory is sized for shorter vectors");
static_assert(2 * WIDE <= ATTENTION_PADDING, "scratch memory is sized for shorter vectors");

// ------------------------------------------------------------------------------------------------------- factors

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

INLINE void write_weights(Pair* weights, int64_t n, Floats x) {
  Bfloat16 rounded[WIDE];
  write(rounded, x);
  __builtin_memcpy(weights + n / 2, rounded, sizeof rounded);
}

#include "softmax.h"  // after write_weights, which it calls

// At most `most` of what is left, split so that the last part is not much shorter: short parts leave multipliers idle.
INLINE int64_t next_part(int64_t left, int64_t most) {
  return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

// Columns of the panel that starts at `start` of `count`.
INLINE int64_t panel_columns(int64_t start, int64_t count) {
  return next_part(vectors_of(count - start), VECTORS) * WIDE;
}

// Prefetches rows of the next head while this one is computed: a head's rows lie a page apart, and waiting for them would
// take as long as the products of a short head.
template <typename Stored, typename Factor>
INLINE void prefetch_next_head(const AttentionHead<Stored, Factor>& head, int64_t first, int64_t rows) {
  if (head.next_query == nullptr) return;
  const int64_t part_stride = head.key - head.query, line = 64 / sizeof(Stored);
  for (int64_t r = first; r < first + rows; ++r)
    for (int64_t part = 0; part < 3; ++part) {
      const Stored* row = head.next_query + r * head.token_stride + part * part_stride;
      for (int64_t e = 0; e < head.width; e += line) __builtin_prefetch(row + e, 0, 2);
    }
}

// Keys as columns of panels, padded with zeros.
template <typename Stored, typename Factor>
TARGET static void pack_keys(const AttentionHead<Stored, Factor>& head) {
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

// A vector of values of one token, or of two; `next` is nullptr after the last.
template <typename Stored>
INLINE void pack_values(float* to, const Stored* token, const Stored*, int64_t left) {
  write(to, read(token, left));
}

INLINE void pack_values(Pair* to, const Bfloat16* token, const Bfloat16* next, int64_t left) {
  write(to, paired(read(token, left), next == nullptr ? Floats{} : read(next, left)));
}

template <typename Stored, typename Factor>
TARGET static void pack_values(const AttentionHead<Stored, Factor>& head) {
  for (int64_t d = 0; d < head.token_factors; ++d) {
    const int64_t n = d * entries_of<Factor>;
    const Stored* token = head.value + n * head.token_stride;
    const Stored* next = n + 1 < head.tokens ? token + head.token_stride : nullptr;
    for (int64_t start = 0, columns; start < head.width; start += columns) {
      columns = panel_columns(start, head.width);
      Factor* to = head.values + start * head.token_factors + d * columns;
      for (int64_t e = start; e < start + columns && e < head.width; e += WIDE, to += WIDE)
        pack_values(to, token + e, next == nullptr ? next : next + e, head.width - e);
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

// ---------------------------------------------------------------------------------------------------------- a head

// Adds these rows' weights to the total. The rows are summed first: fewer long sums, less rounding.
template <typename Stored, typename Factor>
INLINE void add_to_total(const AttentionHead<Stored, Factor>& head, int64_t first, int64_t rows,
                         const float* reciprocals) {
  for (int64_t n = 0; n < head.tokens; n += WIDE) {
    Floats sums = {};
    for (int64_t r = first ? 0 : 1; r < rows; ++r)
      sums += read(head.scores + r * head.padded_tokens + n) * broadcast(reciprocals[r]);
    write(head.total + n, read(head.total + n) + sums);
  }
}

template <typename Stored, typename Factor>
TARGET static void attention_head(const AttentionHead<Stored, Factor>& head) {
  pack_keys(head);
  pack_values(head);
  const int64_t tokens = head.tokens, width = head.width;
  const int64_t row_stride = head.padded_width, weight_stride = head.padded_tokens / entries_of<Factor>;
  if (head.mean)
    for (int64_t n = 0; n < head.padded_tokens; ++n) head.total[n] = 0;
  for (int64_t first = 0, rows; first < tokens; first += rows) {
    rows = next_part(tokens - first, ROWS);
    prefetch_next_head(head, first, rows);
    for (int64_t r = 0; r < rows; ++r)
      widen_row(head.rows + r * row_stride, head.query + (first + r) * head.token_stride, width);
    multiply_rows(rows, head.rows, row_stride, head.keys, tokens, head.width_factors, head.scores, head.padded_tokens);
    float reciprocals[ROWS];  // of the softmax's denominators
    for (int64_t r = 0; r < rows; ++r) {
      const bool in_alpha = head.mean || (head.alpha != nullptr && first + r == 0);
      float* scores = head.scores + r * head.padded_tokens;
      reciprocals[r] = softmax_numerators(scores, head.weights + r * weight_stride, tokens, head.scale, in_alpha);
    }
    if (head.mean)
      add_to_total(head, first, rows, reciprocals);
    else if (head.alpha != nullptr && first == 0)
      for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.scores[n] * reciprocals[0];
    multiply_rows(rows, head.weights, weight_stride, head.values, width, head.token_factors, head.results, row_stride);
    for (int64_t r = 0; r < rows; ++r) {
      Stored* out = head.out + (first + r) * head.out_stride;
      for (int64_t e = 0; e < width; e += WIDE)
        write(out + e, read(head.results + r * row_stride + e) * broadcast(reciprocals[r]), width - e);
    }
  }
  if (head.mean) {
    const float share = static_cast<float>(1 / static_cast<double>(tokens - 1));
    for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.total[n] * share;
  }
}
