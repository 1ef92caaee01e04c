// The softmax of a row of logits. Included by kernels after floats.h and where weights become other factors than floats
// after put_weights for those, once per instruction set: there is no guard against that.

INLINE void put_weights(float* weights, int64_t n, Floats x) { write(weights + n, x); }

// 2^x for x ≤ 0, to 1.4 units of the last place; 0 where that is denormal. A NaN stays.
INLINE Floats power_of_two(Floats x) {
  const Floats shift = each(0x1.8p23f);  // sums with it end in the integer
  const Floats shifted = x + shift, r = x - (shifted - shift);
  // Fitted to 2^r on −½ … ½ with the least relative error, 2e-9, and exactly 1 at 0.
  Floats p = each(1.5353258e-4f);
  p = p * r + each(1.3399003e-3f);
  p = p * r + each(9.618439e-3f);
  p = p * r + each(5.550332e-2f);
  p = p * r + each(0.24022648f);
  p = p * r + each(0.6931472f);
  p = p * r + each(1);
  const Bits scaled = reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23);
  return x < each(-126) ? Floats{} : reinterpret_cast<Floats>(scaled);
}

typedef float Four __attribute__((vector_size(16)));

struct Fours {
  Four part[WIDE / 4];
};

INLINE Fours fours_of(Floats x) {
  Fours fours;
  __builtin_memcpy(&fours, &x, sizeof x);
  return fours;
}

INLINE float largest(Floats x) {
  const Fours fours = fours_of(x);
  Four most = fours.part[0];
  for (int i = 1; i < WIDE / 4; ++i) most = most < fours.part[i] ? fours.part[i] : most;
  const float a = most[0] < most[1] ? most[1] : most[0], b = most[2] < most[3] ? most[3] : most[2];
  return a < b ? b : a;
}

INLINE float total(Floats x) {
  const Fours fours = fours_of(x);
  Four sums = fours.part[0];
  for (int i = 1; i < WIDE / 4; ++i) sums += fours.part[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// 2^(scale (s − max s)) as factors, and in place of the scores where they are `kept`; returns one over their sum. Zeros
// follow up to a whole vector.
template <typename Factor>
TARGET static float soften(float* scores, Factor* weights, int64_t tokens, float scale, bool kept) {
  const int64_t padded = vectors_of(tokens) * WIDE, last = padded - WIDE;
  Words lanes = {};
  for (int lane = 0; lane < WIDE; ++lane) lanes[lane] = lane;
  write(scores + last, lanes < static_cast<int32_t>(tokens - last) ? read(scores + last) : each(-__builtin_inff()));
  Floats most = read(scores);
  for (int64_t n = WIDE; n < padded; n += WIDE) most = larger(most, read(scores + n));
  Floats sums = {};
  const Floats tops = each(largest(most)), scales = each(scale);
  for (int64_t n = 0; n < padded; n += WIDE) {
    const Floats weight = power_of_two((read(scores + n) - tops) * scales);
    sums += weight;
    put_weights(weights, n, weight);
    if (kept) write(scores + n, weight);
  }
  return 1 / total(sums);
}
