// Vectors of one instruction set. Included by each_isa.h, once per set: there is no guard against that.
//
// They are the compiler's own (GCC and clang): + − × / and comparisons work lane by lane on any of them, a × b + c becomes
// one instruction where there is one, and what a CPU lacks is split up by the compiler.

constexpr int LANES = VECTOR_BYTES / 8;  // doubles of a vector

typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef float AsManyFloats __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef Doubles DoublesAnywhere __attribute__((aligned(8), may_alias));
typedef AsManyFloats FloatsAnywhere __attribute__((aligned(4), may_alias));

INLINE Doubles load(const double* from) { return *reinterpret_cast<const DoublesAnywhere*>(from); }

// Widened. GCC 12 splits its own conversion of vectors into halves, so the instruction is named where there is one.
INLINE Doubles load(const float* from) {
#if INTRINSICS == 64
  return reinterpret_cast<Doubles>(_mm512_maskz_cvtps_pd(-1, _mm256_loadu_ps(from)));
#elif INTRINSICS == 32
  return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const FloatsAnywhere*>(from), Doubles);
#endif
}

INLINE void store(double* to, Doubles x) { *reinterpret_cast<DoublesAnywhere*>(to) = x; }

INLINE Doubles everywhere(double x) { return x - Doubles{}; }  // the compiler's word for a broadcast; keeps −0 and NaN

INLINE double sum(Doubles x) {
  double total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}
