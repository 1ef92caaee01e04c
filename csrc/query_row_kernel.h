// α = softmax(scale K q) and z = αᵀV; keys and values are read once, where they are. Included by each_isa.h, once per
// instruction set.

#include "floats.h"
// After it.
#include "softmax.h"

constexpr int TOGETHER = 4;  // keys, so that sums do not wait for one another

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
    for (int r = 0; r < COUNT; ++r) sums[r] += read(query + whole, width - whole) * read(key + r * stride + whole, width - whole);
  for (int r = 0; r < COUNT; ++r) to[r] = static_cast<float>(sum(sums[r]));
}

// Σ_n α[n] v[n, e …] for V vectors of entries, `left` entries there. Every BLOCK tokens are summed apart: a sum of 577
// terms one after the other would lose a digit.
template <int V, bool WHOLE, typename Stored>
INLINE void mix(const QueryRow<Stored>& given, const float* weights, int64_t start, float share) {
  constexpr int64_t BLOCK = 32;
  Floats totals[V] = {};
  const Stored* value = given.value + start;
  const int64_t left = given.width - start;
  for (int64_t first = 0; first < given.tokens; first += BLOCK) {
    const int64_t end = first + BLOCK < given.tokens ? first + BLOCK : given.tokens;
    Floats sums[V] = {};
    for (int64_t n = first; n < end; ++n, value += given.value_stride)
      for (int k = 0; k < V; ++k)
        if (WHOLE)
          sums[k] += each(weights[n]) * read(value + k * WIDE);
        else if (left > k * WIDE)
          sums[k] += each(weights[n]) * read(value + k * WIDE, left - k * WIDE);
    for (int k = 0; k < V; ++k) totals[k] += sums[k];
  }
  for (int k = 0; k < V; ++k)
    if (left > k * WIDE) write(given.z + start + k * WIDE, totals[k] * each(share), left - k * WIDE);
}

template <typename Stored>
TARGET static void query_row(const QueryRow<Stored>& given) {
  const int64_t tokens = given.tokens, width = given.width;
  float* weights = given.weights;
  int64_t n = 0;
  for (; n + TOGETHER <= tokens; n += TOGETHER)
    score<TOGETHER>(given.query, given.key + n * given.key_stride, given.key_stride, width, weights + n);
  for (; n < tokens; ++n) score<1>(given.query, given.key + n * given.key_stride, given.key_stride, width, weights + n);
  const float share = soften(weights, weights, tokens, given.scale, false);
  for (n = 0; n < tokens; ++n) given.alpha[n] = weights[n] * share;
  constexpr int V = 4;
  int64_t start = 0;
  for (; start + V * WIDE <= width; start += V * WIDE) mix<V, true>(given, weights, start, share);
  if (start < width) mix<V, false>(given, weights, start, share);
}
