// Attention of one head of one image, with the weights of the pooled token. Included by each_isa.h, once per
// instruction set.
//
// Six queries at a time meet all keys: their weights (14 KB for 577 tokens) stay in the cache nearest to the core, keys
// and values (300 KB) in the next one, so there is nothing to gain from a softmax in parts. The pooled token's row is one
// of those that are computed anyway. Its weights are those of float32, whatever the factors are; pairs multiply values
// with weights rounded to bfloat16, as torch's own attention does.

#include "floats.h"
#include "pairs.h"
#include "transpose.h"
// These in this order.
#include "attention_tiles.h"
#include "attention_factors.h"
#include "softmax.h"

// The tile's rows are summed before the total takes them: fewer long sums, less rounding.
template <typename Stored, typename Factor>
INLINE void add_to_total(const AttentionHead<Stored, Factor>& head, int64_t first, int64_t rows, const float* shares) {
  for (int64_t n = 0; n < head.tokens; n += WIDE) {
    Floats sums = {};
    for (int64_t r = first ? 0 : 1; r < rows; ++r) {
      const float* weights = head.scores + r * head.padded_tokens;
      sums += read(weights + n) * each(shares[r]);
    }
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
    rows = part_of(tokens - first, ROWS);
    fetch_ahead(head, first, rows);
    for (int64_t r = 0; r < rows; ++r)
      stage(head.rows + r * row_stride, head.query + (first + r) * head.token_stride, width);
    multiply_rows(rows, head.rows, row_stride, head.keys, tokens, head.width_factors, head.scores, head.padded_tokens);
    float shares[ROWS];
    for (int64_t r = 0; r < rows; ++r) {
      const bool kept = head.mean || (head.alpha != nullptr && first + r == 0);
      float* scores = head.scores + r * head.padded_tokens;
      shares[r] = soften(scores, head.weights + r * weight_stride, tokens, head.scale, kept);
    }
    if (head.mean)
      add_to_total(head, first, rows, shares);
    else if (head.alpha != nullptr && first == 0)
      for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.scores[n] * shares[0];
    multiply_rows(rows, head.weights, weight_stride, head.values, width, head.token_factors, head.results, row_stride);
    for (int64_t r = 0; r < rows; ++r) {
      Stored* out = head.out + (first + r) * head.out_stride;
      for (int64_t e = 0; e < width; e += WIDE)
        write(out + e, read(head.results + r * row_stride + e) * each(shares[r]), width - e);
    }
  }
  if (head.mean) {
    const float share = static_cast<float>(1 / static_cast<double>(tokens - 1));
    for (int64_t n = 0; n < tokens; ++n) head.alpha[n] = head.total[n] * share;
  }
}
