#include "moments.h"

#include "export.h"
#include "pool.h"

#define KERNEL "moments_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

template <typename Code>
int moments(MomentsHead<Code> shape, int64_t group_stride, int64_t groups) {
  shape.width = (shape.columns + MOMENTS_ROWS + MOMENTS_COLUMNS - 1) / MOMENTS_COLUMNS * MOMENTS_COLUMNS;
  const auto kernel = PICK(moments_head<Code>);
  return in_parallel(groups, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::needs<double>(MOMENTS_IMAGES * shape.width));
    if (!scratch) return false;
    MomentsHead<Code> head = shape;
    head.x = scratch.take<double>(MOMENTS_IMAGES * shape.width);
    for (int64_t group = begin; group < end; ++group) {
      head.codes = shape.codes + group * group_stride;
      head.centre = shape.centre + group * shape.columns;
      head.total = shape.total + group * shape.columns;
      head.second = shape.second + group * shape.columns * shape.columns;
      kernel(head);
    }
    return true;
  });
}

template <typename Code>
MomentsHead<Code> shape_of(const void* codes, const void* shared, const void* centre) {
  MomentsHead<Code> shape = {};
  shape.codes = static_cast<const Code*>(codes);
  shape.shared = static_cast<const Code*>(shared);
  shape.centre = static_cast<const Code*>(centre);
  return shape;
}

}  // namespace
}  // namespace clipfast

// Adds a batch to the moments of `groups` heads, one thread per head. codes [images, groups, entries] and shared
// [images, columns − entries] with strides in elements, centre [groups, columns] contiguous, all of float or all of double;
// total [groups, columns] and second [groups, columns, columns] contiguous.
CLIPFAST_EXPORT int clipfast_moments(int is_double, const void* codes, int64_t image_stride, int64_t group_stride,
                                     int64_t entry_stride, const void* shared, int64_t shared_image_stride,
                                     int64_t shared_entry_stride, const void* centre, int64_t images, int64_t groups,
                                     int64_t entries, int64_t columns, double* total, double* second) {
  const auto add = [&](auto shape) {
    shape.code_image_stride = image_stride;
    shape.code_entry_stride = entry_stride;
    shape.shared_image_stride = shared_image_stride;
    shape.shared_entry_stride = shared_entry_stride;
    shape.images = images;
    shape.entries = entries;
    shape.columns = columns;
    shape.total = total;
    shape.second = second;
    return clipfast::moments(shape, group_stride, groups);
  };
  return is_double ? add(clipfast::shape_of<double>(codes, shared, centre))
                   : add(clipfast::shape_of<float>(codes, shared, centre));
}
