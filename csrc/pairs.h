// Pairs of bfloat16 and sums of their products. Included by kernels after floats.h, once per instruction set, and so
// without a guard.

INLINE Bits broadcast(Pair x) { return x.bits - Bits{}; }

INLINE Bits read(const Pair* from) { return *reinterpret_cast<const UnalignedBits*>(from); }

INLINE void write(Pair* to, Bits x) { *reinterpret_cast<UnalignedBits*>(to) = x; }

// Pairs of two vectors of floats that were read from bfloat16.
INLINE Bits paired(Floats first, Floats second) {
  return reinterpret_cast<Bits>(first) >> 16 | reinterpret_cast<Bits>(second);
}

INLINE Floats without_denormals(Floats x) {
  const Bits bits = reinterpret_cast<Bits>(x), zero = bits & 0x80000000u;
  return reinterpret_cast<Floats>((bits & 0x7F800000u) != 0 ? bits : zero);
}

// sum + a · b over both entries of the pairs, as AVX512-BF16 computes it: the product of the second entries is added
// first, then that of the first entries, and both sums are rounded to float32. Denormal factors and sums count as zero.
INLINE Floats multiply_add(Floats sum, Bits a, Bits b) {
#ifdef BF16_INSTRUCTIONS
  return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                   reinterpret_cast<__m512bh>(b)));
#else
  const Floats a_first = without_denormals(reinterpret_cast<Floats>(a << 16));
  const Floats b_first = without_denormals(reinterpret_cast<Floats>(b << 16));
  const Floats a_second = without_denormals(reinterpret_cast<Floats>(a & 0xFFFF0000u));
  const Floats b_second = without_denormals(reinterpret_cast<Floats>(b & 0xFFFF0000u));
  sum = without_denormals(without_denormals(sum) + a_second * b_second);
  return without_denormals(sum + a_first * b_first);
#endif
}
