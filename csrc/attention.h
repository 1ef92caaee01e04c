// Attention of one head of one image: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t ATTENTION_ROWS = 6;           // queries that are worked on together
constexpr int64_t ATTENTION_COLUMNS_MOST = 32;  // of a panel, over all instruction sets

template <typename Stored>
struct AttentionHead {
  const Stored* query;  // [tokens, width], and so key and value
  const Stored* key;
  const Stored* value;
  int64_t token_stride;
  int64_t tokens;
  int64_t width;
  float scale;
  Stored* out;  // [tokens, width]
  int64_t out_stride;
  float* alpha;  // [tokens], nullptr for none
  bool mean;     // of the rows after the first, not the first row
  // Scratch; `padded_tokens` and `padded_width` are up to whole panels.
  int64_t padded_tokens;
  int64_t padded_width;
  float* keys;     // [padded_tokens, width] in panels, transposed
  float* values;   // [tokens, padded_width] in panels
  float* queries;  // [ATTENTION_ROWS, padded_width]; rows on their way to the panels and from them, too
  float* weights;  // [ATTENTION_ROWS, padded_tokens]
  float* total;    // [padded_tokens], for a mean
};

}  // namespace clipfast
