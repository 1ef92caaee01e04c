// Per-token scores of texts, summed over heads: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t MAP_ROWS = 6;            // tokens that are worked on together
constexpr int64_t MAP_COLUMNS_MOST = 32;  // texts that are, over all instruction sets

template <typename Stored>
struct TextMaps {
  const float* alpha;  // [heads, tokens], rows alpha_head apart, entries alpha_token apart
  int64_t alpha_head;
  int64_t alpha_token;
  const Stored* value;  // [tokens, heads, width], value_token and value_head apart
  int64_t value_token;
  int64_t value_head;
  const float* basis;    // [heads, width, padded]: texts as columns, zeros from `texts` on
  const int64_t* heads;  // which of them count; nullptr for the first `count`
  int64_t count;
  int64_t begin;  // tokens
  int64_t end;
  int64_t width;
  int64_t texts;
  int64_t padded;  // texts up to MAP_COLUMNS_MOST
  float* out;      // [tokens, texts], added to
  float* rows;     // scratch: [MAP_ROWS, width up to whole vectors], values of 16 bits as floats
  int64_t row_stride;
};

}  // namespace clipfast
