// LayerNorm of a sum: the arguments of the kernels of all instruction sets.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t NORM_MAX_STEP = 64;  // floats that a loop's turn takes with the widest vectors

template <typename Stored>
struct NormRows {
  Stored* x;  // row (i, j) at i · outer_stride + j · inner_stride, changed where there is a delta
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t inner;
  const Stored* delta;  // [rows, width], contiguous; nullptr for none
  const float* weight;  // [width]
  const float* bias;    // [width]
  Stored* out;          // [rows, width], contiguous
  int64_t begin;        // the rows to compute
  int64_t end;
  int64_t width;
  double eps;
  float* row;  // scratch memory: [width + NORM_MAX_STEP]
};

}  // namespace clipfast
