// Moments of one head's codes: what the kernels of all instruction sets are given.
#pragma once

#include <cstdint>

namespace clipfast {

// Images whose entries are widened, joined and centred at a time: they stay in the cache nearest to a core.
constexpr int64_t MOMENTS_IMAGES = 128;
// Rows and columns that the largest tile of any instruction set covers.
constexpr int64_t MOMENTS_ROWS = 6, MOMENTS_COLUMNS = 16;

template <typename Code>
struct MomentsHead {
  const Code* codes;  // [images, entries]
  int64_t code_image_stride;
  int64_t code_entry_stride;
  const Code* shared;  // [images, columns − entries]
  int64_t shared_image_stride;
  int64_t shared_entry_stride;
  const Code* centre;  // [columns]
  int64_t images;
  int64_t entries;
  int64_t columns;
  double* total;   // [columns], added to
  double* second;  // [columns, columns], added to
  // Scratch: [MOMENTS_IMAGES, width], where `width` lets the last tiles reach beyond the columns.
  double* x;
  int64_t width;
};

}  // namespace clipfast
