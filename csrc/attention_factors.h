// Queries, keys, values and weights as factors of products, floats or pairs. Included by attention_kernel.h.

// A row of queries or keys; zeros follow up to a multiple of four factors, and of a vector's in floats.
template <typename Stored>
INLINE void stage(float* to, const Stored* from, int64_t width) {
  for (int64_t e = 0; e < width; e += WIDE) write(to + e, read(from + e, width - e));
}

INLINE void stage(Pair* to, const Bfloat16* from, int64_t width) {
  int64_t e = 0;
  for (; e + 2 * WIDE <= width; e += 2 * WIDE) write(to + e / 2, *reinterpret_cast<const BitsAnywhere*>(from + e));
  for (; e < width; e += 8) {
    Bfloat16 eight[8] = {};
    if (e + 8 <= width)
      __builtin_memcpy(eight, from + e, sizeof eight);
    else
      for (int64_t i = 0; e + i < width; ++i) eight[i] = from[e + i];
    __builtin_memcpy(to + e / 2, eight, sizeof eight);
  }
}

// Has the next head's rows on their way while this one's are computed with: a head's lie far apart, a page each, and
// waiting for them would take as long as a short head's products.
template <typename Stored, typename Factor>
INLINE void fetch_ahead(const AttentionHead<Stored, Factor>& head, int64_t first, int64_t rows) {
  if (head.next_query == nullptr) return;
  const int64_t parts = head.key - head.query, line = 64 / sizeof(Stored);
  for (int64_t r = first; r < first + rows; ++r)
    for (int64_t part = 0; part < 3; ++part) {
      const Stored* row = head.next_query + r * head.token_stride + part * parts;
      for (int64_t e = 0; e < head.width; e += line) __builtin_prefetch(row + e, 0, 2);
    }
}

// Keys as columns of panels. Missing ones are zeros.
template <typename Stored, typename Factor>
TARGET static void pack_keys(const AttentionHead<Stored, Factor>& head) {
  const bool whole = sizeof(Stored) * entries_of<Factor> == sizeof(Factor) && head.width % (16 / sizeof(Stored)) == 0;
  for (int64_t start = 0, columns; start < head.tokens; start += columns) {
    columns = panel_columns(start, head.tokens);
    Factor* panel = head.keys + start * head.width_factors;
    for (int64_t j = 0; j < columns; j += WIDE) {
      const Stored* keys = head.key + (start + j) * head.token_stride;
      const int64_t left = head.tokens - start - j;
      if (whole && left >= WIDE) {  // factors as they are
        const int64_t row_bytes = head.token_stride * static_cast<int64_t>(sizeof(Stored));
        transpose(panel + j, columns, reinterpret_cast<const char*>(keys), row_bytes, head.width_factors);
        continue;
      }
      for (int64_t row = 0; row < WIDE; ++row) {
        Factor* to = head.rows + row * head.padded_width;
        if (row < left)
          stage(to, keys + row * head.token_stride, head.width);
        else
          for (int64_t d = 0; d < head.width_factors; ++d) to[d] = Factor{};
      }
      const int64_t row_bytes = head.padded_width * static_cast<int64_t>(sizeof(Factor));
      transpose(panel + j, columns, reinterpret_cast<const char*>(head.rows), row_bytes, head.width_factors);
    }
  }
}

// A vector of values of one token, or of two; there is no next after the last.
template <typename Stored>
INLINE void put_values(float* to, const Stored* token, const Stored*, int64_t left) {
  write(to, read(token, left));
}

INLINE void put_values(Pair* to, const Bfloat16* token, const Bfloat16* next, int64_t left) {
  write(to, paired(read(token, left), next == nullptr ? Floats{} : read(next, left)));
}

template <typename Stored, typename Factor>
TARGET static void pack_values(const AttentionHead<Stored, Factor>& head) {
  for (int64_t d = 0; d < head.token_factors; ++d) {
    const int64_t n = d * entries_of<Factor>;
    const Stored* token = head.value + n * head.token_stride;
    const Stored* next = n + 1 < head.tokens ? token + head.token_stride : nullptr;
    for (int64_t start = 0, columns; start < head.width; start += columns) {
      columns = panel_columns(start, head.width);
      Factor* to = head.values + start * head.token_factors + d * columns;
      for (int64_t e = start; e < start + columns && e < head.width; e += WIDE, to += WIDE)
        put_values(to, token + e, next == nullptr ? next : next + e, head.width - e);
    }
  }
}

INLINE void put_weights(Pair* weights, int64_t n, Floats x) {
  Bfloat16 rounded[WIDE];
  write(rounded, x);
  __builtin_memcpy(weights + n / 2, rounded, sizeof rounded);
}
