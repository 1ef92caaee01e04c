// Weighted sums of the attention rows of one head of one image: the arguments of the kernels of all instruction sets.
#pragma once

#include "attention.h"

namespace clipfast {

// The fields of AttentionHead that panels.h uses, and what is made of the rows.
template <typename Stored, typename Factor>
struct RowsHead {
  const Stored* query;  // [tokens, width], like key
  const Stored* key;
  const Stored* next_query;  // of the head that this thread takes next, nullptr for none; for prefetching
  int64_t token_stride;
  int64_t tokens;
  int64_t width;
  float scale;           // of logits, as exponents of two: log₂e / √width
  const float* weights;  // [groups, tokens]
  int64_t groups;
  float* out;  // [groups, tokens], rows out_stride apart
  int64_t out_stride;
  // Scratch memory, as AttentionHead has it.
  int64_t width_factors;
  int64_t padded_tokens;
  int64_t padded_width;
  Factor* keys;   // [padded_tokens, width_factors] in panels, transposed
  Factor* rows;   // [ATTENTION_MAX_LANES, padded_width]
  float* scores;  // [ATTENTION_ROWS, padded_tokens]: logits, then the numerators of the softmax
  float* shares;  // [groups, ATTENTION_ROWS]: weights of the rows over the denominators of their softmax
  float* sums;    // [groups, padded_tokens]: of the queries since the last time that they were added to the totals
  float* totals;  // [groups, padded_tokens]
};

}  // namespace clipfast
