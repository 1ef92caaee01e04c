// Attention of one head of one image: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t ATTENTION_ROWS = 6;         // queries that are worked on together
constexpr int64_t ATTENTION_LANES_MOST = 16;  // of a vector, over all instruction sets
constexpr int64_t ATTENTION_PADDING = 32;     // lengths of scratch memory are multiples of it: of any vectors

// Two neighbours of bfloat16, the first in the lower half: what AVX512-BF16 multiplies at a time.
struct Pair {
  uint32_t bits;
};

// Products are of floats, to which everything else is widened, or of pairs. A factor is one or the other.
template <typename Factor>
constexpr int64_t entries_of = 1;
template <>
constexpr int64_t entries_of<Pair> = 2;

template <typename Stored, typename Factor>
struct AttentionHead {
  const Stored* query;  // [tokens, width], and so key and value
  const Stored* key;
  const Stored* value;
  const Stored* next_query;  // of the head that follows, nullptr for none; its key and value lie as far from it
  int64_t token_stride;
  int64_t tokens;
  int64_t width;
  float scale;  // of logits, to powers of two: log₂e / √width
  Stored* out;  // [tokens, width]
  int64_t out_stride;
  float* alpha;  // [tokens], nullptr for none
  bool mean;     // of the rows after the first, not the first row
  // Scratch. Logits are sums over `width_factors`, a multiple of 4, and results over `token_factors`.
  int64_t width_factors;
  int64_t token_factors;
  int64_t padded_tokens;
  int64_t padded_width;
  Factor* keys;     // [padded_tokens, width_factors] in panels, transposed
  Factor* values;   // [token_factors, padded_width] in panels
  Factor* rows;     // [ATTENTION_LANES_MOST, padded_width]: queries, and keys on their way to the panels
  float* scores;    // [ATTENTION_ROWS, padded_tokens]: logits, then weights
  Factor* weights;  // [ATTENTION_ROWS, padded_tokens]: as factors; the scores themselves where these are floats
  float* results;   // [ATTENTION_ROWS, padded_width]
  float* total;     // [padded_tokens], for a mean
};

}  // namespace clipfast
