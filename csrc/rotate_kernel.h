// x ← x cos + turned(x) sin of every row, read and written once. Included by each_isa.h, once per instruction set.

#include "floats.h"

typedef uint64_t Twos __attribute__((vector_size(VECTOR_BYTES)));

// Neighbours change places.
INLINE Bits swapped(Floats x) {
  const Twos both = reinterpret_cast<Twos>(x);
  return reinterpret_cast<Bits>(both << 32 | both >> 32);
}

// turned(x) = (−x₂, x₁) for x = (x₁, x₂), two halves of a row.
template <typename Stored>
INLINE void rotate_halves(Stored* x, const float* cos, const float* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t e = 0; e < half; e += WIDE) {
    const int64_t left = half - e;
    const Floats first = read(x + e, left), second = read(x + half + e, left);
    write(x + e, first * read(cos + e, left) - second * read(sin + e, left), left);
    write(x + half + e, second * read(cos + half + e, left) + first * read(sin + half + e, left), left);
  }
}

// turned(x) = (−x₂, x₁) for every two neighbours (x₁, x₂).
template <typename Stored>
INLINE void rotate_neighbours(Stored* x, const float* cos, const float* sin, int64_t width) {
  Bits signs = {};
  for (int lane = 0; lane < WIDE; lane += 2) signs[lane] = 0x80000000u;
  for (int64_t e = 0; e < width; e += WIDE) {
    const int64_t left = width - e;
    const Floats from = read(x + e, left), turned = reinterpret_cast<Floats>(swapped(from) ^ signs);
    write(x + e, from * read(cos + e, left) + turned * read(sin + e, left), left);
  }
}

template <bool HALVES, typename Stored>
TARGET static void rotate_tokens(const RotateTokens<Stored>& all) {
  for (int64_t unit = all.begin; unit < all.end; ++unit) {
    const int64_t token = unit % all.tokens;
    Stored* first = all.x + unit / all.tokens * all.image_stride + token * all.token_stride;
    for (int64_t part = 0; part < all.parts; ++part)
      for (int64_t head = 0; head < all.heads; ++head) {
        Stored* x = first + part * all.part_stride + head * all.head_stride;
        const int64_t angles = head * all.table_stride + token * all.width;
        if (HALVES)
          rotate_halves(x, all.cos + angles, all.sin + angles, all.width);
        else
          rotate_neighbours(x, all.cos + angles, all.sin + angles, all.width);
      }
  }
}
