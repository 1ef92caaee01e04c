// x ← x + delta and its LayerNorm, a row at a time. Included by each_isa.h, once per instruction set.
//
// Entries are taken about a first mean m, which rounding left a little off; the second pass sums what is left, too, and
// takes it off: Σ (x − m) / W for the mean, squared for the variance. So means of 100 cost no digits.

#include "floats.h"

constexpr int SUMS = 4, STEP = SUMS * WIDE;
static_assert(STEP <= NORM_STEP_MOST, "scratch memory is measured for smaller steps");

// x + delta, rounded as it is stored, into `row`.
template <typename Stored>
INLINE void add_row(const NormRows<Stored>& given, Stored* x, const Stored* delta) {
  for (int64_t i = 0; i < given.width; i += WIDE) {
    const int64_t left = given.width - i;
    Floats value = read(x + i, left);
    if (delta != nullptr) {
      Stored sum[WIDE];
      write(sum, value + read(delta + i, left));
      value = read(sum);
      write(x + i, value, left);
    }
    write(given.row + i, value, left);
  }
}

template <typename Stored>
TARGET static void norm_rows(const NormRows<Stored>& given) {
  const int64_t width = given.width, padded = (width + STEP - 1) / STEP * STEP;
  const double count = static_cast<double>(width);
  float* row = given.row;
  for (int64_t r = given.begin; r < given.end; ++r) {
    Stored* x = given.x + r / given.inner * given.outer_stride + r % given.inner * given.inner_stride;
    add_row(given, x, given.delta == nullptr ? nullptr : given.delta + r * width);
    for (int64_t i = width; i < padded; ++i) row[i] = 0;
    Floats sums[SUMS] = {}, squares[SUMS] = {};
    for (int64_t i = 0; i < padded; i += STEP)
      for (int k = 0; k < SUMS; ++k) sums[k] += read(row + i + k * WIDE);
    const float near = static_cast<float>(sum(sums[0] + sums[1] + (sums[2] + sums[3])) / count);
    for (int64_t i = width; i < padded; ++i) row[i] = near;  // adds nothing to what follows
    for (int k = 0; k < SUMS; ++k) sums[k] = Floats{};
    for (int64_t i = 0; i < padded; i += STEP)
      for (int k = 0; k < SUMS; ++k) {
        const Floats apart = read(row + i + k * WIDE) - each(near);
        sums[k] += apart;
        squares[k] += apart * apart;
      }
    const double off = sum(sums[0] + sums[1] + (sums[2] + sums[3])) / count;
    const double variance = sum(squares[0] + squares[1] + (squares[2] + squares[3])) / count - off * off;
    const Floats rest = each(static_cast<float>(off));
    const Floats scale = each(static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + given.eps)));
    Stored* out = given.out + r * width;
    for (int64_t i = 0; i < width; i += WIDE) {
      const int64_t left = width - i;
      const Floats apart = read(row + i) - each(near) - rest;
      write(out + i, apart * scale * read(given.weight + i, left) + read(given.bias + i, left), left);
    }
  }
}
