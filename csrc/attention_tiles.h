// Products of a few rows with the columns of panels. Included by attention_kernel.h.
//
// In a panel the columns of a tile lie one after the other in the order in which they are read. Factors are floats or
// pairs of bfloat16, sums are of float32.

// A tile's sums fit the registers with their factors: AVX-512 has 32 and the others 16. Four vectors take 10 loads for
// 24 multiply-adds, two 8 for 12.
constexpr int ROWS = ATTENTION_ROWS, VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t SUMMED = 32;  // products of one part of a sum
static_assert(WIDE <= ATTENTION_LANES_MOST, "scratch memory is measured for shorter vectors");
static_assert(2 * WIDE <= ATTENTION_PADDING, "scratch memory is measured for shorter vectors");

INLINE Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

// What is left, in parts of at most `most`: no last part is much shorter, for short ones leave multipliers waiting.
INLINE int64_t part_of(int64_t left, int64_t most) {
  return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

// Columns of the panel that starts at `start` of `count`.
INLINE int64_t panel_columns(int64_t start, int64_t count) {
  return part_of(vectors_of(count - start), VECTORS) * WIDE;
}

// to[r] ← Σ_d a[r, d] panel[d] for R rows and V vectors of columns. The fewer products a sum has, the smaller are the
// numbers that it is rounded at: parts of it are half as far from the truth as one of 200 products.
template <int R, int V, typename Factor>
INLINE void multiply(const Factor* a, int64_t a_stride, const Factor* panel, int64_t depth, float* to,
                     int64_t to_stride) {
  for (int64_t start = 0; start < depth; start += SUMMED) {
    const int64_t end = start + SUMMED < depth ? start + SUMMED : depth;
    Floats sums[R][V] = {};
    for (int64_t d = start; d < end; ++d, panel += V * WIDE) {
      decltype(read(panel)) right[V];
      for (int k = 0; k < V; ++k) right[k] = read(panel + k * WIDE);
      for (int r = 0; r < R; ++r) {
        const auto left = each(a[r * a_stride + d]);
        for (int k = 0; k < V; ++k) sums[r][k] = multiply_add(sums[r][k], left, right[k]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < V; ++k) {
        float* total = to + r * to_stride + k * WIDE;
        write(total, start ? read(total) + sums[r][k] : sums[r][k]);
      }
  }
}

// The same for all panels: `count` columns that were packed to `depth`.
template <int R, typename Factor>
TARGET static void multiply_panels(const Factor* a, int64_t a_stride, const Factor* panels, int64_t count, int64_t depth,
                                   float* to, int64_t to_stride) {
  static_assert(VECTORS == 2 || VECTORS == 4, "a case for every number of vectors");
  for (int64_t start = 0, columns; start < count; start += columns) {
    columns = panel_columns(start, count);
    const Factor* panel = panels + start * depth;
    float* sums = to + start;
    if (columns == VECTORS * WIDE)
      multiply<R, VECTORS>(a, a_stride, panel, depth, sums, to_stride);
    else if (columns == WIDE)
      multiply<R, 1>(a, a_stride, panel, depth, sums, to_stride);
    else if constexpr (VECTORS == 4) {
      if (columns == 3 * WIDE)
        multiply<R, 3>(a, a_stride, panel, depth, sums, to_stride);
      else
        multiply<R, 2>(a, a_stride, panel, depth, sums, to_stride);
    }
  }
}

template <typename Factor>
TARGET static void multiply_rows(int64_t rows, const Factor* a, int64_t a_stride, const Factor* panels, int64_t count,
                                 int64_t depth, float* to, int64_t to_stride) {
  static_assert(ROWS == 6, "a case for every number of rows");
  switch (rows) {
    case 1: return multiply_panels<1>(a, a_stride, panels, count, depth, to, to_stride);
    case 2: return multiply_panels<2>(a, a_stride, panels, count, depth, to, to_stride);
    case 3: return multiply_panels<3>(a, a_stride, panels, count, depth, to, to_stride);
    case 4: return multiply_panels<4>(a, a_stride, panels, count, depth, to, to_stride);
    case 5: return multiply_panels<5>(a, a_stride, panels, count, depth, to, to_stride);
    default: return multiply_panels<6>(a, a_stride, panels, count, depth, to, to_stride);
  }
}
