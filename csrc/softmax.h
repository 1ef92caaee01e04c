// The softmax of a row of logits. Included by kernels after floats.h, once per instruction set, and so without a guard.
// A kernel whose weights are other factors than floats defines write_weights for them before.

INLINE void write_weights(float* weights, int64_t n, Floats x) { write(weights + n, x); }

// 2^x for x ≤ 0, to 1.4 units of the last place; 0 where that is denormal. A NaN stays NaN.
INLINE Floats power_of_two(Floats x) {
  const Floats shift = broadcast(0x1.8p23f);  // its last place is 1, so adding it rounds to an integer
  const Floats shifted = x + shift, r = x - (shifted - shift);
  // Fitted to 2^r on −½ … ½ with the least relative error, 2e-9, and exactly 1 at 0.
  Floats p = broadcast(1.5353258e-4f);
  p = p * r + broadcast(1.3399003e-3f);
  p = p * r + broadcast(9.618439e-3f);
  p = p * r + broadcast(5.550332e-2f);
  p = p * r + broadcast(0.24022648f);
  p = p * r + broadcast(0.6931472f);
  p = p * r + broadcast(1);
  const Bits scaled = reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23);
  return x < broadcast(-126) ? Floats{} : reinterpret_cast<Floats>(scaled);
}

// Reductions go over four lanes at a time: the last four in a fixed order.
typedef float Four __attribute__((vector_size(16)));

struct Fours {
  Four part[WIDE / 4];
};

INLINE Fours fours_of(Floats x) {
  Fours fours;
  __builtin_memcpy(&fours, &x, sizeof x);
  return fours;
}

INLINE float max_of(Floats x) {
  const Fours fours = fours_of(x);
  Four most = fours.part[0];
  for (int i = 1; i < WIDE / 4; ++i) most = most < fours.part[i] ? fours.part[i] : most;
  const float a = most[0] < most[1] ? most[1] : most[0], b = most[2] < most[3] ? most[3] : most[2];
  return a < b ? b : a;
}

INLINE float sum_of(Floats x) {
  const Fours fours = fours_of(x);
  Four sums = fours.part[0];
  for (int i = 1; i < WIDE / 4; ++i) sums += fours.part[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// weights[n] ← 2^(scale (s[n] − max s)) as factors, padded with zeros to a whole vector; with `keep` also in place of the
// scores. Returns the reciprocal of their sum.
template <typename Factor>
TARGET static float softmax_numerators(float* scores, Factor* weights, int64_t tokens, float scale, bool keep) {
  const int64_t padded = vectors_of(tokens) * WIDE, last = padded - WIDE;
  Words lanes = {};
  for (int lane = 0; lane < WIDE; ++lane) lanes[lane] = lane;
  const Floats minus_infinity = broadcast(-__builtin_inff());
  write(scores + last, lanes < static_cast<int32_t>(tokens - last) ? read(scores + last) : minus_infinity);
  Floats most = read(scores);
  for (int64_t n = WIDE; n < padded; n += WIDE) most = maximum(most, read(scores + n));
  Floats sums = {};
  const Floats row_max = broadcast(max_of(most)), scales = broadcast(scale);
  for (int64_t n = 0; n < padded; n += WIDE) {
    const Floats weight = power_of_two((read(scores + n) - row_max) * scales);
    sums += weight;
    write_weights(weights, n, weight);
    if (keep) write(scores + n, weight);
  }
  return 1 / sum_of(sums);
}
