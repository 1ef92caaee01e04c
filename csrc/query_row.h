// Attention of one query in one head of one image: the arguments of the kernels of all instruction sets.
#pragma once

#include "formats.h"

namespace clipfast {

template <typename Stored>
struct QueryRow {
  const float* query;  // [width]
  const Stored* key;   // [tokens, width], rows key_stride apart
  int64_t key_stride;
  const Stored* value;  // [tokens, width], rows value_stride apart
  int64_t value_stride;
  int64_t tokens;
  int64_t width;
  float scale;  // of logits, as exponents of two: log₂e / √width
  float* z;        // [width]
  float* alpha;    // [tokens]
  float* weights;  // scratch memory: [tokens up to whole vectors]
};

}  // namespace clipfast
