// An activation in place: what the kernels of all instruction sets are given.
#pragma once

#include "formats.h"

namespace clipfast {

// As kernels/native_ops.py numbers them.
enum Activation { gelu = 0, gelu_tanh = 1, quick_gelu = 2 };

template <typename Stored>
struct Activated {
  Stored* x;          // [rows, columns], contiguous
  const float* bias;  // [columns], added before; nullptr for nothing
  int64_t rows;
  int64_t columns;
  int activation;
};

}  // namespace clipfast
