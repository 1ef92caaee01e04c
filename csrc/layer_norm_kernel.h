// x ← x + delta and its LayerNorm, a row at a time. Included by each_isa.h, once per instruction set.
//
// A first pass sums the row for an approximate mean m. The second sums x − m and (x − m)²: the mean is m + Σ (x − m) / W,
// and the variance has no digits lost to a mean that is large beside it.

#include "floats.h"

constexpr int SUMS = 4, STEP = SUMS * WIDE;
static_assert(STEP <= NORM_MAX_STEP, "scratch memory is sized for smaller steps");

// Writes x and returns it as it was stored.
INLINE Floats write_back(float* to, Floats x, int64_t count) {
  write(to, x, count);
  return x;
}

template <typename Stored>
INLINE Floats write_back(Stored* to, Floats x, int64_t count) {
  write(to, x, count);
  return read(to, count);
}

// x + delta of a vector's entries from i on, rounded as it is stored; a copy goes to `row`.
template <typename Stored>
INLINE Floats add(const NormRows<Stored>& rows, Stored* x, const Stored* delta, int64_t i, int64_t count) {
  Floats value = read(x + i, count);
  if (delta != nullptr) value = write_back(x + i, value + read(delta + i, count), count);
  write(rows.row + i, value);
  return value;
}

INLINE double sum(const Floats* sums) { return sum(sums[0] + sums[1] + (sums[2] + sums[3])); }

template <typename Stored>
TARGET static void norm_rows(const NormRows<Stored>& rows) {
  const int64_t width = rows.width, steps = width / STEP * STEP, whole = width / WIDE * WIDE;
  const int64_t padded = (width + STEP - 1) / STEP * STEP;
  const double count = static_cast<double>(width);
  float* row = rows.row;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    Stored* x = rows.x + r / rows.inner * rows.outer_stride + r % rows.inner * rows.inner_stride;
    const Stored* delta = rows.delta == nullptr ? nullptr : rows.delta + r * width;
    Floats sums[SUMS] = {}, squares[SUMS] = {};
    for (int64_t i = 0; i < steps; i += STEP)
      for (int k = 0; k < SUMS; ++k) sums[k] += add(rows, x, delta, i + k * WIDE, WIDE);
    for (int64_t i = steps; i < width; i += WIDE) sums[0] += add(rows, x, delta, i, width - i);
    const float first_mean = static_cast<float>(sum(sums) / count);
    for (int64_t i = width; i < padded; ++i) row[i] = first_mean;  // adds 0 to the sums that follow
    for (int k = 0; k < SUMS; ++k) sums[k] = Floats{};
    for (int64_t i = 0; i < padded; i += STEP)
      for (int k = 0; k < SUMS; ++k) {
        const Floats centred = read(row + i + k * WIDE) - broadcast(first_mean);
        sums[k] += centred;
        squares[k] += centred * centred;
      }
    const double correction = sum(sums) / count, variance = sum(squares) / count - correction * correction;
    const Floats rest = broadcast(static_cast<float>(correction));
    const Floats scale = broadcast(static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + rows.eps)));
    Stored* out = rows.out + r * width;
    for (int64_t i = 0; i < whole; i += WIDE) {
      const Floats centred = read(row + i) - broadcast(first_mean) - rest;
      write(out + i, centred * scale * read(rows.weight + i) + read(rows.bias + i));
    }
    if (whole < width) {
      const Floats centred = read(row + whole) - broadcast(first_mean) - rest;
      const Floats weight = read(rows.weight + whole, width - whole);
      write(out + whole, centred * scale * weight + read(rows.bias + whole, width - whole), width - whole);
    }
  }
}
