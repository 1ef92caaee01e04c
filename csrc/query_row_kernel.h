// α = softmax(scale K q) and z = αᵀV; keys and values are read once, in place. Included by each_isa.h, once per
// instruction set.

#include "floats.h"
#include "softmax.h"  // after floats.h

constexpr int KEYS = 4;  // whose sums are formed side by side, so that additions do not wait for one another

// Σ_e q[e] k[r, e] for COUNT keys.
template <int COUNT, typename Stored>
INLINE void score(const float* query, const Stored* key, int64_t stride, int64_t width, float* to) {
  Floats sums[COUNT] = {};
  const int64_t whole = width / WIDE * WIDE;
  for (int64_t e = 0; e < whole; e += WIDE) {
    const Floats part = read(query + e);
    for (int r = 0; r < COUNT; ++r) sums[r] += part * read(key + r * stride + e);
  }
  if (whole < width)
    for (int r = 0; r < COUNT; ++r)
      sums[r] += read(query + whole, width - whole) * read(key + r * stride + whole, width - whole);
  for (int r = 0; r < COUNT; ++r) to[r] = static_cast<float>(sum(sums[r]));
}

// Σ_n α[n] v[n, e] for V vectors of entries from `start` on; WHOLE where the row has that many. Every BLOCK tokens have a
// sum of their own: one running sum of 577 terms would lose a digit.
template <int V, bool WHOLE, typename Stored>
INLINE void sum_values(const QueryRow<Stored>& row, const float* weights, int64_t start, float reciprocal) {
  constexpr int64_t BLOCK = 32;
  Floats totals[V] = {};
  const Stored* value = row.value + start;
  const int64_t left = row.width - start;
  for (int64_t first = 0; first < row.tokens; first += BLOCK) {
    const int64_t end = first + BLOCK < row.tokens ? first + BLOCK : row.tokens;
    Floats sums[V] = {};
    for (int64_t n = first; n < end; ++n, value += row.value_stride)
      for (int k = 0; k < V; ++k)
        if (WHOLE)
          sums[k] += broadcast(weights[n]) * read(value + k * WIDE);
        else if (left > k * WIDE)
          sums[k] += broadcast(weights[n]) * read(value + k * WIDE, left - k * WIDE);
    for (int k = 0; k < V; ++k) totals[k] += sums[k];
  }
  for (int k = 0; k < V; ++k)
    if (left > k * WIDE) write(row.z + start + k * WIDE, totals[k] * broadcast(reciprocal), left - k * WIDE);
}

template <typename Stored>
TARGET static void query_row(const QueryRow<Stored>& row) {
  const int64_t tokens = row.tokens, width = row.width;
  float* weights = row.weights;
  int64_t n = 0;
  for (; n + KEYS <= tokens; n += KEYS)
    score<KEYS>(row.query, row.key + n * row.key_stride, row.key_stride, width, weights + n);
  for (; n < tokens; ++n) score<1>(row.query, row.key + n * row.key_stride, row.key_stride, width, weights + n);
  const float reciprocal = softmax_numerators(weights, weights, tokens, row.scale, false);
  for (n = 0; n < tokens; ++n) row.alpha[n] = weights[n] * reciprocal;
  constexpr int V = 4;
  int64_t start = 0;
  for (; start + V * WIDE <= width; start += V * WIDE) sum_values<V, true>(row, weights, start, reciprocal);
  if (start < width) sum_values<V, false>(row, weights, start, reciprocal);
}
