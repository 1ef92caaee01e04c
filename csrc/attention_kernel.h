// Attention of one head of one image, with the weights of the pooled token. Included by each_isa.h, once per
// instruction set.
//
// Six queries at a time are multiplied with all keys: their weights (14 KB for 577 tokens) stay in the L1 cache, keys and
// values (300 KB) in L2, so an online softmax over blocks of keys would gain nothing. The pooled token's row is one of
// those that are computed anyway. Its weights are those of float32, whatever the factors are; pairs multiply values with
// weights rounded to bfloat16, as torch's own attention does.

#include "floats.h"
#include "panels.h"  // after floats.h

INLINE void write_weights(Pair* weights, int64_t n, Floats x) {
  Bfloat16 rounded[WIDE];
  write(rounded, x);
  __builtin_memcpy(weights + n / 2, rounded, sizeof rounded);
}

#include "softmax.h"  // after write_weights, which it calls

// -------------------------------------------------------------------------------------------------------------- values

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

// ---------------------------------------------------------------------------------------------------------- a head

constexpr int64_t PARTIAL_TILES = 128;  // of rows, whose weights are summed in `total` before they are added to alpha

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
  if (head.mean) {
    for (int64_t n = 0; n < head.padded_tokens; ++n) head.total[n] = 0;
    for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = 0;
  }
  int64_t tiles = 0;
  for (int64_t first = 0, rows; first < tokens; first += rows) {
    rows = next_part(tokens - first, ROWS);
    prefetch_next_head<3>(head, first, rows);
    for (int64_t r = 0; r < rows; ++r)
      widen_row(head.rows + r * row_stride, head.query + (first + r) * head.token_stride, width);
    multiply_rows(rows, head.rows, row_stride, head.keys, tokens, head.width_factors, head.scores, head.padded_tokens);
    float reciprocals[ROWS];  // of the softmax's denominators
    for (int64_t r = 0; r < rows; ++r) {
      const bool in_alpha = head.mean || (head.alpha != nullptr && first + r == 0);
      float* scores = head.scores + r * head.padded_tokens;
      reciprocals[r] = softmax_numerators(scores, head.weights + r * weight_stride, tokens, head.scale, in_alpha);
    }
    if (head.mean) {
      add_to_total(head, first, rows, reciprocals);
      if (++tiles % PARTIAL_TILES == 0)
        for (int64_t n = 0; n < tokens; ++n) head.alpha[n] += head.total[n], head.total[n] = 0;
    } else if (head.alpha != nullptr && first == 0) {
      for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.scores[n] * reciprocals[0];
    }
    multiply_rows(rows, head.weights, weight_stride, head.values, width, head.token_factors, head.results, row_stride);
    for (int64_t r = 0; r < rows; ++r) {
      Stored* out = head.out + (first + r) * head.out_stride;
      for (int64_t e = 0; e < width; e += WIDE)
        write(out + e, read(head.results + r * row_stride + e) * broadcast(reciprocals[r]), width - e);
    }
  }
  if (head.mean) {
    const float share = static_cast<float>(1 / static_cast<double>(tokens - 1));
    for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = (head.alpha[n] + head.total[n]) * share;
  }
}
