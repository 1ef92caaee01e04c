// Moments of one head's codes: the arguments of the kernels of all instruction sets.
#pragma once

#include <cstdint>

namespace clipfast {

// Images whose entries are widened, joined and centred at a time: they stay in the L1 cache.
constexpr int64_t MOMENTS_IMAGES = 128;
// Rows and columns of the largest tile, that of the widest vectors.
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
  // Scratch memory: [MOMENTS_IMAGES, width], where `width` has space for tiles that reach beyond the columns.
  double* x;
  int64_t width;
};

}  // namespace clipfast
