// Weighted sums of the attention rows of one head of one image. Included by each_isa.h, once per instruction set.
//
// As in attention_kernel.h, six queries at a time are multiplied with all keys. Their rows are added to every group's sum
// while they are in the L1 cache: the N × N weights of a head are never in memory.

#include "floats.h"
#include "panels.h"   // after floats.h
#include "softmax.h"  // after floats.h

constexpr int GROUPS = 4;              // that a tile of rows is added to at a time: a row is loaded once for all of them
constexpr int64_t PARTIAL_TILES = 32;  // of rows, whose sums are added to the total: the longer a sum, the more it rounds

// sums[g] += Σ_r shares[g, r] rows[r] for COUNT groups.
template <int COUNT>
INLINE void add_rows(const float* shares, const float* const (&rows)[ROWS], int64_t tokens, float* sums,
                     int64_t stride) {
  for (int64_t n = 0; n < tokens; n += WIDE) {
    Floats row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = read(rows[r] + n);
    for (int g = 0; g < COUNT; ++g) {
      Floats sum = broadcast(shares[g * ROWS]) * row[0];
      for (int r = 1; r < ROWS; ++r) sum += broadcast(shares[g * ROWS + r]) * row[r];
      float* to = sums + g * stride + n;
      write(to, read(to) + sum);
    }
  }
}

template <typename Stored, typename Factor>
TARGET static void add_tile(const RowsHead<Stored, Factor>& head, int64_t count) {
  const float* rows[ROWS];  // a row that is missing is another one times 0
  for (int r = 0; r < ROWS; ++r) rows[r] = head.scores + (r < count ? r : 0) * head.padded_tokens;
  static_assert(GROUPS == 4, "a case for every number of groups");
  for (int64_t g = 0; g < head.groups; g += GROUPS) {
    const float* shares = head.shares + g * ROWS;
    float* sums = head.sums + g * head.padded_tokens;
    switch (head.groups - g) {
      case 1: add_rows<1>(shares, rows, head.tokens, sums, head.padded_tokens); break;
      case 2: add_rows<2>(shares, rows, head.tokens, sums, head.padded_tokens); break;
      case 3: add_rows<3>(shares, rows, head.tokens, sums, head.padded_tokens); break;
      default: add_rows<4>(shares, rows, head.tokens, sums, head.padded_tokens);
    }
  }
}

template <typename Stored, typename Factor>
TARGET static void weighted_rows_head(const RowsHead<Stored, Factor>& head) {
  pack_keys(head);
  const int64_t tokens = head.tokens, stride = head.padded_tokens, entries = head.groups * stride;
  for (int64_t n = 0; n < entries; ++n) head.sums[n] = head.totals[n] = 0;
  int64_t tiles = 0;
  for (int64_t first = 0, rows; first < tokens; first += rows) {
    rows = next_part(tokens - first, ROWS);
    prefetch_next_head<2>(head, first, rows);
    for (int64_t r = 0; r < rows; ++r)
      widen_row(head.rows + r * head.padded_width, head.query + (first + r) * head.token_stride, head.width);
    multiply_rows(rows, head.rows, head.padded_width, head.keys, tokens, head.width_factors, head.scores, stride);
    for (int64_t r = 0; r < ROWS; ++r) {
      float* row = head.scores + r * stride;
      const float reciprocal = r < rows ? softmax_numerators(row, row, tokens, head.scale, false) : 0;
      for (int64_t g = 0; g < head.groups; ++g)
        head.shares[g * ROWS + r] = r < rows ? head.weights[g * tokens + first + r] * reciprocal : 0;
    }
    add_tile(head, rows);
    if (++tiles % PARTIAL_TILES && first + rows < tokens) continue;
    for (int64_t n = 0; n < entries; n += WIDE) {
      write(head.totals + n, read(head.totals + n) + read(head.sums + n));
      write(head.sums + n, Floats{});
    }
  }
  for (int64_t g = 0; g < head.groups; ++g)
    for (int64_t n = 0; n < tokens; n += WIDE)
      write(head.out + g * head.out_stride + n, read(head.totals + g * stride + n), tokens - n);
}
