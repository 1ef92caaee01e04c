// Transposes rows of 32-bit elements. Included by kernels after floats.h, once per instruction set, and so without a guard.
//
// A vector is treated as groups of four lanes, each loaded from a row of its own. Four such vectors are transposed within
// their groups: a load per 16 bytes and two shuffles per vector, whatever its width.

#if INTRINSICS == 64
#define ON_BITS(name, a, b) \
  reinterpret_cast<Bits>(_mm512_maskz_##name(-1, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)))
#elif INTRINSICS == 32
#define ON_BITS(name, a, b) \
  reinterpret_cast<Bits>(_mm256_##name(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)))
#elif VECTOR_BYTES == 16 && defined(__SSE2__)
#define ON_BITS(name, a, b) \
  reinterpret_cast<Bits>(_mm_##name(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)))
#endif

// 16 bytes from each of several rows that lie `stride` bytes apart.
INLINE Bits read_fours(const char* from, int64_t stride) {
#if INTRINSICS == 64
  __m128i row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
  __m512i x = _mm512_castsi128_si512(row[0]);
  x = _mm512_maskz_inserti32x4(-1, x, row[1], 1);
  x = _mm512_maskz_inserti32x4(-1, x, row[2], 2);
  return reinterpret_cast<Bits>(_mm512_maskz_inserti32x4(-1, x, row[3], 3));
#elif INTRINSICS == 32
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + stride));
  return reinterpret_cast<Bits>(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
#else
  Bits x;
  for (int i = 0; i < WIDE / 4; ++i) __builtin_memcpy(reinterpret_cast<char*>(&x) + 16 * i, from + i * stride, 16);
  return x;
#endif
}

// Transposes the 4 × 4 elements that x[0], x[1], x[2] and x[3] have in every group of four lanes.
INLINE void transpose_fours(Bits (&x)[4]) {
#ifdef ON_BITS
  const Bits a = ON_BITS(unpacklo_epi32, x[0], x[1]), b = ON_BITS(unpacklo_epi32, x[2], x[3]);
  const Bits c = ON_BITS(unpackhi_epi32, x[0], x[1]), d = ON_BITS(unpackhi_epi32, x[2], x[3]);
  x[0] = ON_BITS(unpacklo_epi64, a, b), x[1] = ON_BITS(unpackhi_epi64, a, b);
  x[2] = ON_BITS(unpacklo_epi64, c, d), x[3] = ON_BITS(unpackhi_epi64, c, d);
#else
  for (int lane = 0; lane < WIDE; lane += 4)
    for (int i = 1; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const uint32_t below = x[i][lane + j];
        x[i][lane + j] = x[j][lane + i], x[j][lane + i] = below;
      }
#endif
}
#undef ON_BITS

// Writes column i of WIDE rows to `to + i * columns`, for `count` columns, a multiple of 4.
template <typename Element>
INLINE void transpose(Element* to, int64_t columns, const char* rows, int64_t row_bytes, int64_t count) {
  static_assert(sizeof(Element) == 4, "rows of 32-bit elements");
  for (int64_t i = 0; i < count; i += 4, rows += 16, to += 4 * columns) {
    Bits x[4];
    for (int j = 0; j < 4; ++j) x[j] = read_fours(rows + j * row_bytes, 4 * row_bytes);
    transpose_fours(x);
    for (int j = 0; j < 4; ++j) *reinterpret_cast<UnalignedBits*>(to + j * columns) = x[j];
  }
}
