// Vectors of floats, read from and written to every dtype of Stored, with exp and erf. Included by kernels, once per
// instruction set, and so without a guard.

constexpr int WIDE = VECTOR_BYTES / 4;  // floats of a vector

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));
typedef Bits UnalignedBits __attribute__((aligned(2), may_alias));

// How many vectors hold so many floats.
INLINE int64_t vectors_of(int64_t count) { return (count + WIDE - 1) / WIDE; }

INLINE Floats broadcast(float x) { return x - Floats{}; }

INLINE Floats broadcast(int x) { return broadcast(static_cast<float>(x)); }

INLINE Floats read(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }

INLINE void write(float* to, Floats x) { *reinterpret_cast<UnalignedFloats*>(to) = x; }

INLINE Floats read(const Bfloat16* from) {
#if INTRINSICS == 64
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(-1, stored)) << 16);
#elif INTRINSICS == 32
  const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(stored)) << 16);
#else
  Bits bits = {};
  for (int lane = 0; lane < WIDE; ++lane) bits[lane] = static_cast<uint32_t>(from[lane].bits) << 16;
  return reinterpret_cast<Floats>(bits);
#endif
}

// To the nearest, ties to even. The instruction of AVX512-BF16 flushes denormal numbers to zero.
INLINE void write(Bfloat16* to, Floats x) {
#ifdef BF16_INSTRUCTIONS
  const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(rounded));
#else
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  const Bits result = x == x ? rounded : quiet;
#if INTRINSICS == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(-1, reinterpret_cast<__m512i>(result)));
#elif INTRINSICS == 32
  const __m256i both = reinterpret_cast<__m256i>(result);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  for (int lane = 0; lane < WIDE; ++lane) to[lane].bits = static_cast<uint16_t>(result[lane]);
#endif
#endif
}

INLINE Floats read(const Half* from) {
#if INTRINSICS == 64
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(-1, stored));
#elif INTRINSICS == 32
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Floats x = {};
  for (int lane = 0; lane < WIDE; ++lane) x[lane] = widened(from[lane]);
  return x;
#endif
}

// To the nearest, ties to even.
INLINE void write(Half* to, Floats x) {
#if INTRINSICS == 64
  const __m256i result = _mm512_maskz_cvtps_ph(-1, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
#elif INTRINSICS == 32
  const __m128i result = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), result);
#else
  for (int lane = 0; lane < WIDE; ++lane) to[lane] = narrowed(x[lane]);
#endif
}

// At most a whole vector: `count` entries, the others read as zeros.
template <typename Stored>
INLINE Floats read(const Stored* from, int64_t count) {
  if (count >= WIDE) return read(from);
  Stored all[WIDE] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = from[i];
  return read(all);
}

template <typename Stored>
INLINE void write(Stored* to, Floats x, int64_t count) {
  if (count >= WIDE) return write(to, x);
  Stored all[WIDE];
  write(all, x);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

INLINE double sum(Floats x) {
  double total = 0;
  for (int lane = 0; lane < WIDE; ++lane) total += static_cast<double>(x[lane]);
  return total;
}

INLINE Floats maximum(Floats x, Floats y) { return x < y ? y : x; }  // a NaN in x stays NaN
INLINE Floats minimum(Floats x, Floats y) { return x > y ? y : x; }

// e^x as 2^k e^r with |r| ≤ ln 2 / 2: to 1 unit of the last place, for denormal results and infinity too.
INLINE Floats exponential(Floats x) {
  x = minimum(maximum(x, broadcast(-104)), broadcast(89));
  const Floats shift = broadcast(0x1.8p23f);  // its last place is 1, so adding it rounds to an integer
  const Floats shifted = x * broadcast(1.44269504f) + shift, k = shifted - shift;
  // ln 2 in two parts; the first has 9 bits, so its products are exact.
  const Floats r = x - k * broadcast(0.693359375f) - k * broadcast(-2.12194440e-4f);
  Floats p = broadcast(1.f / 5040);  // a Taylor series, whose next term is 5e-9
  p = p * r + broadcast(1.f / 720);
  p = p * r + broadcast(1.f / 120);
  p = p * r + broadcast(1.f / 24);
  p = p * r + broadcast(1.f / 6);
  p = p * r + broadcast(1.f / 2);
  p = p * r + broadcast(1);
  p = p * r + broadcast(1);
  // 2^k as two factors: 2¹²⁸ and 2⁻¹⁵⁰ are not floats.
  const Words whole = reinterpret_cast<Words>(reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(shift));
  const Words half = whole >> 1;
  const Bits first = reinterpret_cast<Bits>(half) + 127u;
  const Bits second = reinterpret_cast<Bits>(whole) - reinterpret_cast<Bits>(half) + 127u;
  return p * reinterpret_cast<Floats>(first << 23) * reinterpret_cast<Floats>(second << 23);
}

// Fitted to erf x / x on 0 … 3.93 with the least relative error, in x².
constexpr int ERF_DEGREE = 5;
constexpr float ERF_END = 3.93f;
constexpr float ERF_P[] = {1.1283791e+00f, 1.9077943e-01f, 5.2789673e-02f, 3.7794113e-03f, 2.848027e-04f, 2.041986e-06f};
constexpr float ERF_Q[] = {1.0e+00f, 5.024066e-01f, 1.14255674e-01f, 1.4997043e-02f, 1.165162e-03f, 3.800392e-05f};

// erf x = x P(x²) / Q(x²) up to ERF_END, from where on it rounds to ±1.
INLINE Floats error_function(Floats x) {
  const Floats end = broadcast(ERF_END), within = minimum(maximum(x, -end), end), t = within * within;
  Floats p = broadcast(ERF_P[ERF_DEGREE]), q = broadcast(ERF_Q[ERF_DEGREE]);
  for (int i = ERF_DEGREE - 1; i >= 0; --i) {
    p = p * t + broadcast(ERF_P[i]);
    q = q * t + broadcast(ERF_Q[i]);
  }
  const Floats y = within * p / q;
  return x >= end ? broadcast(1) : x <= -end ? broadcast(-1) : y;
}
