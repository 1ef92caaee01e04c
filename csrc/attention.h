// Attention of one head of one image: the arguments of the kernels of all instruction sets.
#pragma once

#include "formats.h"
#include "tensor.h"

namespace clipfast {

constexpr int64_t ATTENTION_ROWS = 6;        // queries that are processed together
constexpr int64_t ATTENTION_MAX_LANES = 16;  // floats of the widest vector
constexpr int64_t ATTENTION_PADDING = 32;    // lengths of scratch memory are multiples of this: two of the widest vectors

// Two neighbours of bfloat16, the first in the lower half: what AVX512-BF16 multiplies at a time.
struct Pair {
  uint32_t bits;
};

// A factor of a product is a float, to which other dtypes are widened, or a pair. How many entries of a row it holds:
template <typename Factor>
constexpr int64_t entries_of = 1;
template <>
constexpr int64_t entries_of<Pair> = 2;

template <typename Stored, typename Factor>
struct AttentionHead {
  const Stored* query;  // [tokens, width], like key and value
  const Stored* key;
  const Stored* value;
  const Stored* next_query;  // of the head that this thread takes next, nullptr for none; for prefetching
  int64_t token_stride;
  int64_t tokens;
  int64_t width;
  float scale;  // of logits, as exponents of two: log₂e / √width
  Stored* out;  // [tokens, width]
  int64_t out_stride;
  float* alpha;  // [tokens], nullptr for none
  bool mean;     // alpha is the mean over the rows after the first, not the first row
  // Scratch memory. Logits are sums over `width_factors`, a multiple of 4, and results over `token_factors`.
  int64_t width_factors;
  int64_t token_factors;
  int64_t padded_tokens;
  int64_t padded_width;
  Factor* keys;     // [padded_tokens, width_factors] in panels, transposed
  Factor* values;   // [token_factors, padded_width] in panels
  Factor* rows;     // [ATTENTION_MAX_LANES, padded_width]: queries, and keys before they are transposed
  float* scores;    // [ATTENTION_ROWS, padded_tokens]: logits, then the numerators of the softmax
  Factor* weights;  // [ATTENTION_ROWS, padded_tokens]: the numerators as factors; `scores` itself where these are floats
  float* results;   // [ATTENTION_ROWS, padded_width]
  float* total;     // [padded_tokens], for a mean
};

// Whether heads of this dtype are multiplied in pairs.
bool multiplies_pairs(Dtype dtype);

}  // namespace clipfast
