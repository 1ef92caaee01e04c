// A LayerNorm of a sum: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

constexpr int64_t NORM_STEP_MOST = 64;  // floats that are summed side by side, over all instruction sets

template <typename Stored>
struct NormRows {
  Stored* x;  // row (i, j) at i · outer_stride + j · inner_stride, changed where there is a delta
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t inner;
  const Stored* delta;  // [rows, width], contiguous; nullptr for nothing
  const float* weight;  // [width]
  const float* bias;    // [width]
  Stored* out;          // [rows, width], contiguous
  int64_t begin;        // rows
  int64_t end;
  int64_t width;
  double eps;
  float* row;  // scratch: [width up to NORM_STEP_MOST]
};

}  // namespace clipfast
