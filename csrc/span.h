// TEXTSPAN of one head: the arguments of the kernels of all instruction sets.
#pragma once

#include <cstdint>

namespace clipfast {

// Texts of a tile with the widest vectors; scratch memory is sized for it.
constexpr int64_t SPAN_MAX_TILE = 32;

template <typename Stored>
struct SpanHead {
  const Stored* texts;  // [count, rank]
  int64_t text_stride;
  int64_t rank_stride;
  const double* factor;  // [rank, rank], L with the covariance L Lᵀ
  int64_t count;
  int64_t rank;
  int64_t steps;  // at most `rank`
  double floor;
  // Results, filled with −1 and 0 before.
  int64_t* picks;      // [steps]
  Stored* variance;    // [steps]
  Stored* directions;  // [steps, rank]
  // Scratch memory, see span.cpp. `width` is `rank` up to whole vectors; rows of that length are padded with zeros.
  int64_t width;
  Stored* tiles;   // [tiles, rank, texts of a tile]
  double* left;    // [texts in tiles]
  double* pairs;   // [width / 2, rank, 2]
  double* rows;    // [rank, width], the factor
  double* known;   // [steps, width]
  double* along;   // [width or steps, the larger]
  double* pick;    // [width]
  double* shadow;  // [width]
  double* both;    // [rank, 2]
};

}  // namespace clipfast
