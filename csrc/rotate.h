// Rotary positions of some queries and keys: the arguments of the kernels of all instruction sets.
#pragma once

#include "formats.h"

namespace clipfast {

template <typename Stored>
struct RotateTokens {
  Stored* x;  // [images, tokens, parts, heads, width]; changed
  int64_t image_stride;
  int64_t token_stride;
  int64_t part_stride;
  int64_t head_stride;
  int64_t tokens;
  int64_t parts;
  int64_t heads;
  int64_t width;
  const float* cos;  // [heads or 1, tokens, width], like sin
  const float* sin;
  int64_t table_stride;  // from one head's angles to the next one's, 0 where all share them
  int64_t begin;         // of images · tokens, those to rotate
  int64_t end;
};

}  // namespace clipfast
