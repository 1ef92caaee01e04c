#include "span.h"

#include <algorithm>

#include "export.h"
#include "pool.h"

namespace clipfast {

// Variances that differ by less of the first pick's are equal (kernels/reference.py says why).
constexpr double SPAN_EQUAL = 4e-15;

}  // namespace clipfast

#define KERNEL "span_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename Stored>
int span(const Stored* texts, int64_t group_stride, int64_t text_stride, int64_t rank_stride, const double* factor,
         int64_t groups, int64_t count, int64_t rank, int64_t size, double floor, int64_t* picks, Stored* variance,
         Stored* directions) {
  SpanHead<Stored> shape = {};
  shape.text_stride = text_stride;
  shape.rank_stride = rank_stride;
  shape.count = count;
  shape.rank = rank;
  shape.steps = std::min(size, rank);
  shape.floor = floor;
  shape.width = rounded(rank, 8);
  const int64_t in_tiles = rounded(count, SPAN_TILE_MOST), along = std::max(shape.width, shape.steps);
  const size_t bytes = Scratch::needs<Stored>(in_tiles * rank) + Scratch::needs<double>(in_tiles) +
                       2 * Scratch::needs<double>(shape.width * rank) +
                       Scratch::needs<double>(shape.steps * shape.width) + Scratch::needs<double>(along) +
                       2 * Scratch::needs<double>(shape.width) + Scratch::needs<double>(2 * rank);
  const auto kernel = PICK(span_head<Stored>);
  return in_parallel(groups, 1, [=](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    if (!scratch) return false;
    SpanHead<Stored> head = shape;
    head.tiles = scratch.take<Stored>(in_tiles * rank);
    head.left = scratch.take<double>(in_tiles);
    head.pairs = scratch.take<double>(head.width * rank);
    head.rows = scratch.take<double>(head.width * rank);
    head.known = scratch.take<double>(head.steps * head.width);
    head.along = scratch.take<double>(along);
    head.pick = scratch.take<double>(head.width);
    head.shadow = scratch.take<double>(head.width);
    head.both = scratch.take<double>(2 * rank);
    for (int64_t group = begin; group < end; ++group) {
      head.texts = texts + group * group_stride;
      head.factor = factor + group * rank * rank;
      head.picks = picks + group * size;
      head.variance = variance + group * size;
      head.directions = directions + group * size * rank;
      kernel(head);
    }
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// TEXTSPAN of `groups` heads, one thread per head. texts [groups, count, rank] of float or double with strides in
// elements, factor [groups, rank, rank] contiguous; results contiguous, [groups, size] and [groups, size, rank] of the
// texts' type, filled with −1 and 0 before. count and rank are at least 1.
CLIPFAST_EXPORT int clipfast_span(int is_double, const void* texts, int64_t group_stride, int64_t text_stride,
                                  int64_t rank_stride, const double* factor, int64_t groups, int64_t count,
                                  int64_t rank, int64_t size, double floor, int64_t* picks, void* variance,
                                  void* directions) {
  if (is_double)
    return clipfast::span(static_cast<const double*>(texts), group_stride, text_stride, rank_stride, factor, groups,
                          count, rank, size, floor, picks, static_cast<double*>(variance),
                          static_cast<double*>(directions));
  return clipfast::span(static_cast<const float*>(texts), group_stride, text_stride, rank_stride, factor, groups, count,
                        rank, size, floor, picks, static_cast<float*>(variance), static_cast<float*>(directions));
}
