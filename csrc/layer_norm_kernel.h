// x ← x + delta and its LayerNorm, a row at a time. Included by each_isa.h, once per instruction set.
//
// Entries are taken about a first mean m, which rounding left a little off; the second pass sums what is left, too, and
// takes it off: Σ (x − m) / W for the mean, squared for the variance. So means of 100 cost no digits.

#include "floats.h"

constexpr int SUMS = 4, STEP = SUMS * WIDE;
static_assert(STEP <= NORM_STEP_MOST, "scratch memory is measured for smaller steps");

// Writes x, and returns what was written.
INLINE Floats keep(float* to, Floats x, int64_t count) {
  write(to, x, count);
  return x;
}

template <typename Stored>
INLINE Floats keep(Stored* to, Floats x, int64_t count) {
  write(to, x, count);
  return read(to, count);
}

// x + delta, rounded as it is stored, of a vector's entries from i on; into `row`, too.
template <typename Stored>
INLINE Floats add(const NormRows<Stored>& given, Stored* x, const Stored* delta, int64_t i, int64_t count) {
  Floats value = read(x + i, count);
  if (delta != nullptr) value = keep(x + i, value + read(delta + i, count), count);
  write(given.row + i, value);
  return value;
}

INLINE double sum(const Floats* sums) { return sum(sums[0] + sums[1] + (sums[2] + sums[3])); }

template <typename Stored>
TARGET static void norm_rows(const NormRows<Stored>& given) {
  const int64_t width = given.width, steps = width / STEP * STEP, whole = width / WIDE * WIDE;
  const int64_t padded = (width + STEP - 1) / STEP * STEP;
  const double count = static_cast<double>(width);
  float* row = given.row;
  for (int64_t r = given.begin; r < given.end; ++r) {
    Stored* x = given.x + r / given.inner * given.outer_stride + r % given.inner * given.inner_stride;
    const Stored* delta = given.delta == nullptr ? nullptr : given.delta + r * width;
    Floats sums[SUMS] = {}, squares[SUMS] = {};
    for (int64_t i = 0; i < steps; i += STEP)
      for (int k = 0; k < SUMS; ++k) sums[k] += add(given, x, delta, i + k * WIDE, WIDE);
    for (int64_t i = steps; i < width; i += WIDE) sums[0] += add(given, x, delta, i, width - i);
    const float near = static_cast<float>(sum(sums) / count);
    for (int64_t i = width; i < padded; ++i) row[i] = near;  // adds nothing to what follows
    for (int k = 0; k < SUMS; ++k) sums[k] = Floats{};
    for (int64_t i = 0; i < padded; i += STEP)
      for (int k = 0; k < SUMS; ++k) {
        const Floats apart = read(row + i + k * WIDE) - each(near);
        sums[k] += apart;
        squares[k] += apart * apart;
      }
    const double off = sum(sums) / count, variance = sum(squares) / count - off * off;
    const Floats rest = each(static_cast<float>(off));
    const Floats scale = each(static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + given.eps)));
    Stored* out = given.out + r * width;
    for (int64_t i = 0; i < whole; i += WIDE) {
      const Floats apart = read(row + i) - each(near) - rest;
      write(out + i, apart * scale * read(given.weight + i) + read(given.bias + i));
    }
    if (whole < width) {
      const Floats apart = read(row + whole) - each(near) - rest, weight = read(given.weight + whole, width - whole);
      write(out + whole, apart * scale * weight + read(given.bias + whole, width - whole), width - whole);
    }
  }
}
