// Per-token scores of texts, summed over heads: the arguments of the kernels of all instruction sets.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t MAP_ROWS = 6;            // tokens that are processed together
constexpr int64_t MAP_MAX_COLUMNS = 32;  // texts that are, with the widest vectors; the basis is padded to a multiple

template <typename Stored>
struct TextMaps {
  const float* alpha;  // [heads, tokens], rows alpha_head apart, entries alpha_token apart
  int64_t alpha_head;
  int64_t alpha_token;
  const Stored* value;  // [tokens, heads, width], value_token and value_head apart
  int64_t value_token;
  int64_t value_head;
  const float* basis;    // [heads, width, padded], zeros from `texts` on
  const int64_t* heads;  // [count], which heads to sum over; nullptr for all
  int64_t count;
  int64_t begin;  // the tokens to compute
  int64_t end;
  int64_t width;
  int64_t texts;
  int64_t padded;  // texts up to a multiple of MAP_MAX_COLUMNS
  float* out;      // [tokens, texts], added to
  float* rows;     // scratch memory: [MAP_ROWS, row_stride], values of 16 bits as floats
  int64_t row_stride;
};

}  // namespace clipfast
