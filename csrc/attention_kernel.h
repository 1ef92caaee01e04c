// Attention of one head of one image, with the weights of the pooled token. Included by each_isa.h, once per instruction
// set.
//
// Six queries at a time meet all keys: their weights (14 KB for 577 tokens) stay in the cache nearest to the core, keys and
// values (300 KB) in the next one, so there is nothing to gain from a softmax in parts. Both products run over panels, in
// which the columns of a tile lie one after the other in the order in which they are read; sums are of float32 whatever
// the format. The pooled token's row is one of those that are computed anyway.

#include "softmax.h"

constexpr int ROWS = ATTENTION_ROWS, VECTORS = 2;  // of a tile: 12 sums, which with their factors fit 16 registers
constexpr int COLUMNS = VECTORS * WIDE;
static_assert(COLUMNS <= ATTENTION_COLUMNS_MOST, "scratch memory is measured for narrower panels");

// Columns of the panel that starts at `start`: the last may be a single vector.
INLINE int64_t panel_columns(int64_t start, int64_t count) { return count - start > WIDE ? COLUMNS : WIDE; }

// to[r] ← Σ_d a[r, d] panel[d] for ROW_COUNT rows and V vectors of columns.
template <int ROW_COUNT, int V>
INLINE void multiply(const float* a, int64_t a_stride, const float* panel, int64_t depth, float* to, int64_t to_stride) {
  Floats sums[ROW_COUNT][V] = {};
  for (int64_t d = 0; d < depth; ++d, panel += V * WIDE) {
    Floats right[V];
    for (int k = 0; k < V; ++k) right[k] = read(panel + k * WIDE);
    for (int r = 0; r < ROW_COUNT; ++r) {
      const Floats left = each(a[r * a_stride + d]);
      for (int k = 0; k < V; ++k) sums[r][k] += left * right[k];
    }
  }
  for (int r = 0; r < ROW_COUNT; ++r)
    for (int k = 0; k < V; ++k) write(to + r * to_stride + k * WIDE, sums[r][k]);
}

// The same for all panels: `count` columns that were packed to `depth`.
template <int ROW_COUNT>
TARGET static void multiply_panels(const float* a, int64_t a_stride, const float* panels, int64_t count, int64_t depth,
                                   float* to, int64_t to_stride) {
  for (int64_t start = 0; start < count; start += COLUMNS) {
    if (panel_columns(start, count) == COLUMNS)
      multiply<ROW_COUNT, VECTORS>(a, a_stride, panels + start * depth, depth, to + start, to_stride);
    else
      multiply<ROW_COUNT, 1>(a, a_stride, panels + start * depth, depth, to + start, to_stride);
  }
}

TARGET static void multiply_rows(int64_t rows, const float* a, int64_t a_stride, const float* panels, int64_t count,
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

template <typename Stored>
INLINE void widen_row(float* to, const Stored* from, int64_t width) {
  for (int64_t e = 0; e < width; e += WIDE) write(to + e, read(from + e, width - e));
}

// Keys as columns of panels. Four rows at a time are widened, and their entries interleaved; missing keys are zeros.
template <typename Stored>
TARGET static void pack_keys(const AttentionHead<Stored>& head) {
  const int64_t width = head.width, stride = head.padded_width;
  for (int64_t start = 0; start < head.tokens; start += COLUMNS) {
    const int64_t columns = panel_columns(start, head.tokens);
    float* panel = head.keys + start * width;
    for (int64_t j = 0; j < columns; j += 4) {
      for (int64_t row = 0; row < 4; ++row) {
        float* to = head.queries + row * stride;
        if (start + j + row < head.tokens)
          widen_row(to, head.key + (start + j + row) * head.token_stride, width);
        else
          for (int64_t e = 0; e < width; ++e) to[e] = 0;
      }
      const float *a = head.queries, *b = a + stride, *c = b + stride, *d = c + stride;
      int64_t e = 0;
#if defined(__SSE__)
      for (; e + 4 <= width; e += 4) {
        __m128 w = _mm_loadu_ps(a + e), x = _mm_loadu_ps(b + e), y = _mm_loadu_ps(c + e), z = _mm_loadu_ps(d + e);
        _MM_TRANSPOSE4_PS(w, x, y, z);
        float* to = panel + e * columns + j;
        _mm_storeu_ps(to, w);
        _mm_storeu_ps(to + columns, x);
        _mm_storeu_ps(to + 2 * columns, y);
        _mm_storeu_ps(to + 3 * columns, z);
      }
#endif
      for (; e < width; ++e) {
        float* to = panel + e * columns + j;
        to[0] = a[e], to[1] = b[e], to[2] = c[e], to[3] = d[e];
      }
    }
  }
}

template <typename Stored>
TARGET static void pack_values(const AttentionHead<Stored>& head) {
  for (int64_t n = 0; n < head.tokens; ++n) {
    const Stored* row = head.value + n * head.token_stride;
    for (int64_t start = 0; start < head.width; start += COLUMNS) {
      const int64_t columns = panel_columns(start, head.width);
      float* to = head.values + start * head.tokens + n * columns;
      for (int64_t e = 0; e < columns; e += WIDE) {
        const int64_t left = head.width - start - e;
        write(to + e, left > 0 ? read(row + start + e, left) : Floats{});
      }
    }
  }
}

template <typename Stored>
TARGET static void attention_head(const AttentionHead<Stored>& head) {
  pack_keys(head);
  pack_values(head);
  const int64_t tokens = head.tokens, width = head.width, stride = head.padded_width;
  if (head.mean)
    for (int64_t n = 0; n < tokens; ++n) head.total[n] = 0;
  for (int64_t first = 0; first < tokens; first += ROWS) {
    const int64_t rows = tokens - first < ROWS ? tokens - first : ROWS;
    for (int64_t r = 0; r < rows; ++r)
      widen_row(head.queries + r * stride, head.query + (first + r) * head.token_stride, width);
    multiply_rows(rows, head.queries, stride, head.keys, tokens, width, head.weights, head.padded_tokens);
    float shares[ROWS];
    for (int64_t r = 0; r < rows; ++r) shares[r] = soften(head.weights + r * head.padded_tokens, tokens, head.scale);
    if (head.mean)
      for (int64_t r = first ? 0 : 1; r < rows; ++r) {
        const float* weights = head.weights + r * head.padded_tokens;
        for (int64_t n = 0; n < tokens; ++n) head.total[n] += weights[n] * shares[r];
      }
    else if (head.alpha != nullptr && first == 0)
      for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.weights[n] * shares[0];
    multiply_rows(rows, head.weights, head.padded_tokens, head.values, width, tokens, head.queries, stride);
    for (int64_t r = 0; r < rows; ++r) {
      Stored* out = head.out + (first + r) * head.out_stride;
      for (int64_t e = 0; e < width; e += WIDE)
        write(out + e, read(head.queries + r * stride + e) * each(shares[r]), width - e);
    }
  }
  if (head.mean) {
    const float share = static_cast<float>(1 / static_cast<double>(tokens - 1));
    for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.total[n] * share;
  }
}
