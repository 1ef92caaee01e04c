// All picks of one head. Included by each_isa.h, once per instruction set.
//
// With the covariance S = L Lᵀ and P the projection away from what was picked, text t explains v_t = A_t P S P A_tᵀ.
// Picking j adds the direction w = P A_j / ‖P A_j‖; with u = P S w and q = w·u,
//
//     v_t ← v_t − s_t (2 x_t − s_t q),    s_t = A_t·w,  x_t = A_t·u
//
// so a pick reads the texts once and writes one variance per text. A head's texts (0.9 MB for 3,500 of rank 64) are packed
// once into tiles in the order in which they are read, and stay in the L2 cache of the core that computes the head.
// Everything except the texts in memory is float64: such differences lose digits as variances fall.

constexpr int VECTORS = 4;  // of a tile: twice as many sums run side by side, enough to hide the latency of an addition
constexpr int TILE = VECTORS * LANES;
static_assert(TILE <= SPAN_MAX_TILE, "scratch memory is sized for smaller tiles");

struct Dots {
  Doubles first[VECTORS], second[VECTORS];
};

// Products of every text of a tile with two vectors, from coordinate `start` on, as the pairs (first[r], second[r]).
template <typename Stored>
INLINE Dots dots(const Stored* tile, const double* pair, int64_t start, int64_t rank) {
  Dots sums = {};
  for (int64_t r = start; r < rank; ++r) {
    const Doubles first = broadcast(pair[2 * r]), second = broadcast(pair[2 * r + 1]);
    for (int k = 0; k < VECTORS; ++k) {
      const Doubles text = load(tile + r * TILE + k * LANES);
      sums.first[k] += text * first;
      sums.second[k] += text * second;
    }
  }
  return sums;
}

INLINE double dot(const double* x, const double* y, int64_t width) {
  Doubles sums = {};
  for (int64_t r = 0; r < width; r += LANES) sums += load(x + r) * load(y + r);
  return sum(sums);
}

// x ← x + scale · y
INLINE void add(double* x, double scale, const double* y, int64_t width) {
  const Doubles scales = broadcast(scale);
  for (int64_t r = 0; r < width; r += LANES) store(x + r, load(x + r) + scales * load(y + r));
}

// Removes from x its components along the first `step` directions.
template <typename Stored>
TARGET static void remove_known(const SpanHead<Stored>& head, double* x, int64_t step) {
  for (int64_t j = 0; j < step; ++j) head.along[j] = dot(head.known + j * head.width, x, head.width);
  for (int64_t j = 0; j < step; ++j) add(x, -head.along[j], head.known + j * head.width, head.width);
}

// Packs the texts into tiles, the last one padded with zeros; false where a text is not finite.
template <typename Stored>
TARGET static bool pack_texts(const SpanHead<Stored>& head) {
  bool finite = true;
  Stored* to = head.tiles;
  for (int64_t start = 0; start < head.count; start += TILE) {
    const int64_t own = head.count - start < TILE ? head.count - start : TILE;
    for (int64_t r = 0; r < head.rank; ++r, to += TILE) {
      const Stored* from = head.texts + start * head.text_stride + r * head.rank_stride;
      for (int64_t t = 0; t < own; ++t) {
        const Stored x = from[t * head.text_stride];
        finite &= x - x == 0;
        to[t] = x;
      }
      for (int64_t t = own; t < TILE; ++t) to[t] = 0;
    }
  }
  return finite;
}

// Packs the factor by rows and by pairs of columns; false where it is not finite.
template <typename Stored>
TARGET static bool pack_factor(const SpanHead<Stored>& head) {
  bool finite = true;
  for (int64_t r = 0; r < head.rank; ++r) {
    double* row = head.rows + r * head.width;
    for (int64_t c = 0; c < head.width; ++c) {
      row[c] = c < head.rank ? head.factor[r * head.rank + c] : 0;
      finite &= row[c] - row[c] == 0;
      head.pairs[(c / 2 * head.rank + r) * 2 + c % 2] = row[c];
    }
  }
  return finite;
}

// v_t = ‖A_t L‖² before anything is picked. The zeros that columns of a triangular L start with are skipped.
template <typename Stored>
TARGET static void first_variances(const SpanHead<Stored>& head) {
  for (int64_t c = 0; c < head.width; c += 2) {
    const double* pair = head.pairs + c * head.rank;
    int64_t start = 0;
    while (start < head.rank && pair[2 * start] == 0 && pair[2 * start + 1] == 0) ++start;
    head.along[c] = static_cast<double>(start);
  }
  const Stored* tile = head.tiles;
  for (int64_t t = 0; t < head.count; t += TILE, tile += head.rank * TILE) {
    Doubles variance[VECTORS] = {};
    for (int64_t c = 0; c < head.width; c += 2) {
      const Dots sums = dots(tile, head.pairs + c * head.rank, static_cast<int64_t>(head.along[c]), head.rank);
      for (int k = 0; k < VECTORS; ++k)
        variance[k] += sums.first[k] * sums.first[k] + sums.second[k] * sums.second[k];
    }
    for (int k = 0; k < VECTORS; ++k) store(head.left + t + k * LANES, variance[k]);
  }
}

// v ← v − s (2 x − s q) for all texts, from the pairs of w and u.
template <typename Stored>
TARGET static void update_variances(const SpanHead<Stored>& head, double q) {
  const Doubles two = broadcast(2), shared = broadcast(q);
  const Stored* tile = head.tiles;
  for (int64_t t = 0; t < head.count; t += TILE, tile += head.rank * TILE) {
    const Dots sums = dots(tile, head.both, 0, head.rank);
    for (int k = 0; k < VECTORS; ++k) {
      double* left = head.left + t + k * LANES;
      store(left, load(left) - sums.first[k] * (two * sums.second[k] - sums.first[k] * shared));
    }
  }
}

// The largest variance, or 0 where all are smaller. The texts that pad the last tile have variance 0.
TARGET static double largest(const double* left, int64_t count) {
  Doubles best[VECTORS] = {};
  for (int64_t t = 0; t < count; t += TILE)
    for (int k = 0; k < VECTORS; ++k) {
      const Doubles here = load(left + t + k * LANES);
      best[k] = here > best[k] ? here : best[k];
    }
  double maximum = 0;
  for (int k = 0; k < VECTORS; ++k)
    for (int lane = 0; lane < LANES; ++lane) maximum = best[k][lane] > maximum ? best[k][lane] : maximum;
  return maximum;
}

// Writes w of the picked text to `pick` and u = P S w to `shadow`; returns q = w·u. Gram-Schmidt twice is exact to rounding.
template <typename Stored>
TARGET static double direction_of(const SpanHead<Stored>& head, int64_t pick, int64_t step) {
  const Stored* text = head.tiles + pick / TILE * head.rank * TILE + pick % TILE;
  for (int64_t r = 0; r < head.width; ++r) head.pick[r] = r < head.rank ? text[r * TILE] : 0;
  for (int pass = 0; pass < 2; ++pass) {
    remove_known(head, head.pick, step);
    const double length = __builtin_sqrt(dot(head.pick, head.pick, head.width));
    const double divisor = length > __DBL_MIN__ ? length : __DBL_MIN__;
    for (int64_t r = 0; r < head.width; ++r) head.pick[r] /= divisor;
  }
  for (int64_t r = 0; r < head.width; ++r) head.along[r] = head.shadow[r] = 0;
  for (int64_t r = 0; r < head.rank; ++r) add(head.along, head.pick[r], head.rows + r * head.width, head.width);
  for (int64_t r = 0; r < head.rank; ++r) head.shadow[r] = dot(head.rows + r * head.width, head.along, head.width);
  remove_known(head, head.shadow, step);
  return dot(head.pick, head.shadow, head.width);
}

template <typename Stored>
TARGET static void span_head(const SpanHead<Stored>& head) {
  const bool texts_finite = pack_texts(head), factor_finite = pack_factor(head);
  if (!texts_finite || !factor_finite) return;
  first_variances(head);
  const double first = largest(head.left, head.count);
  double limit = head.floor * __DBL_MIN__;
  for (int64_t step = 0; step < head.steps; ++step) {
    const double best = step ? largest(head.left, head.count) : first;
    if (!(best > limit)) return;
    limit = head.floor * (first > __DBL_MIN__ ? first : __DBL_MIN__);
    // The first of those that are equal; none where variances overflowed.
    const double least = best - SPAN_EQUAL * first;
    int64_t pick = 0;
    while (pick < head.count && !(head.left[pick] >= least)) ++pick;
    if (pick == head.count) return;
    const double q = direction_of(head, pick, step);
    if (q == 0) return;  // a square that overflowed or underflowed: nothing would change, and the next pick be the same
    head.picks[step] = pick;
    head.variance[step] = static_cast<Stored>(head.left[pick]);
    double* known = head.known + step * head.width;
    for (int64_t r = 0; r < head.width; ++r) known[r] = head.pick[r];
    for (int64_t r = 0; r < head.rank; ++r) {
      head.directions[step * head.rank + r] = static_cast<Stored>(head.pick[r]);
      head.both[2 * r] = head.pick[r];
      head.both[2 * r + 1] = head.shadow[r];
    }
    update_variances(head, q);
  }
}
