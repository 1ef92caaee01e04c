// Softmax of one row. Included by kernels, once per instruction set: there is no guard against that.

#include "floats.h"

// exp(scale (s − max s)) in place; returns one over their sum. Zeros follow up to a whole vector.
TARGET static float soften(float* weights, int64_t tokens, float scale) {
  const int64_t padded = (tokens + WIDE - 1) / WIDE * WIDE;
  for (int64_t n = tokens; n < padded; ++n) weights[n] = -__builtin_inff();
  Floats most = read(weights);
  for (int64_t n = WIDE; n < padded; n += WIDE) most = larger(most, read(weights + n));
  float top = most[0];
  for (int lane = 1; lane < WIDE; ++lane) top = top < most[lane] ? most[lane] : top;
  Floats sums = {};
  const Floats tops = each(top), scales = each(scale);
  for (int64_t n = 0; n < padded; n += WIDE) {
    const Floats weight = exponential((read(weights + n) - tops) * scales);
    sums += weight;
    write(weights + n, weight);
  }
  return static_cast<float>(1 / sum(sums));
}
