// Adds a batch to one head's moments. Included by each_isa.h, once per instruction set.
//
// With x_b = [codes_b, shared_b] − centre: total += Σ_b x_b and second += Σ_b x_b x_bᵀ, in float64 throughout, as exact as
// the definition: eigenvalues of a covariance matter down to 1e-12 of the first, far below the error of float32 sums.
// Codes are read once, in place. Only tiles on or above the diagonal are computed, and the same is added to the mirrored
// entry, so a symmetric matrix stays symmetric to the bit.

constexpr int ROWS = MOMENTS_ROWS, VECTORS = 2;  // of a tile: 12 sums and their factors fit 16 registers
constexpr int COLUMNS = VECTORS * LANES;
static_assert(COLUMNS <= MOMENTS_COLUMNS, "scratch memory is sized for smaller tiles");

// Writes images from `first` on, centred, to the rows of x, padded with zeros, and adds their sum to the total.
template <typename Code>
TARGET static void centre_images(const MomentsHead<Code>& head, int64_t first, int64_t images) {
  for (int64_t b = 0; b < images; ++b) {
    const Code* code = head.codes + (first + b) * head.code_image_stride;
    const Code* shared = head.shared + (first + b) * head.shared_image_stride;
    double* x = head.x + b * head.width;
    if (head.code_entry_stride == 1)
      for (int64_t c = 0; c < head.entries; ++c) x[c] = static_cast<double>(code[c]);
    else
      for (int64_t c = 0; c < head.entries; ++c) x[c] = static_cast<double>(code[c * head.code_entry_stride]);
    for (int64_t c = head.entries; c < head.columns; ++c)
      x[c] = static_cast<double>(shared[(c - head.entries) * head.shared_entry_stride]);
    for (int64_t c = 0; c < head.columns; ++c) {
      x[c] -= static_cast<double>(head.centre[c]);
      head.total[c] += x[c];
    }
    for (int64_t c = head.columns; c < head.width; ++c) x[c] = 0;
  }
}

// Products of columns i … i + ROWS − 1 of x with columns j … j + COLUMNS − 1, added where i ≤ j and mirrored.
template <typename Code>
TARGET static void add_tile(const MomentsHead<Code>& head, int64_t images, int64_t i, int64_t j) {
  Doubles sums[ROWS][VECTORS] = {};
  const double* x = head.x;
  for (int64_t b = 0; b < images; ++b, x += head.width) {
    Doubles right[VECTORS];
    for (int k = 0; k < VECTORS; ++k) right[k] = load(x + j + k * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const Doubles left = broadcast(x[i + r]);
      for (int k = 0; k < VECTORS; ++k) sums[r][k] += left * right[k];
    }
  }
  double added[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < VECTORS; ++k) store(&added[r][k * LANES], sums[r][k]);
  const int64_t rows = head.columns - i < ROWS ? head.columns - i : ROWS;
  const int64_t columns = head.columns - j < COLUMNS ? head.columns - j : COLUMNS;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      if (i + r > j + c) continue;
      head.second[(i + r) * head.columns + j + c] += added[r][c];
      if (i + r < j + c) head.second[(j + c) * head.columns + i + r] += added[r][c];
    }
}

template <typename Code>
TARGET static void moments_head(const MomentsHead<Code>& head) {
  for (int64_t first = 0; first < head.images; first += MOMENTS_IMAGES) {
    const int64_t left = head.images - first, images = left < MOMENTS_IMAGES ? left : MOMENTS_IMAGES;
    centre_images(head, first, images);
    for (int64_t i = 0; i < head.columns; i += ROWS)
      for (int64_t j = i / COLUMNS * COLUMNS; j < head.columns; j += COLUMNS) add_tile(head, images, i, j);
  }
}
