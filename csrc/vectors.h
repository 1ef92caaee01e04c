// Vectors of doubles of one instruction set. Included by each_isa.h, once per set, and so without a guard.
//
// They are the compiler's own (GCC and clang): + − × / and comparisons work lane by lane, a × b + c becomes one instruction
// where the CPU has it, and vectors that are too wide for the CPU are split by the compiler.

constexpr int LANES = VECTOR_BYTES / 8;  // doubles of a vector

typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float HalfWidthFloats __attribute__((vector_size(VECTOR_BYTES / 2)));  // as many floats as Doubles has doubles
typedef Doubles UnalignedDoubles __attribute__((aligned(8), may_alias));
typedef HalfWidthFloats UnalignedHalfWidthFloats __attribute__((aligned(4), may_alias));

INLINE Doubles load(const double* from) { return *reinterpret_cast<const UnalignedDoubles*>(from); }

// Widened to doubles. GCC 12 splits __builtin_convertvector into halves, so the instruction is named where there is one.
INLINE Doubles load(const float* from) {
#if INTRINSICS == 64
  return reinterpret_cast<Doubles>(_mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(from)));
#elif INTRINSICS == 32
  return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfWidthFloats*>(from), Doubles);
#endif
}

INLINE void store(double* to, Doubles x) { *reinterpret_cast<UnalignedDoubles*>(to) = x; }

INLINE Doubles broadcast(double x) { return x - Doubles{}; }  // compiles to a broadcast; keeps −0 and NaN

INLINE double sum(Doubles x) {
  double total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}
