#include "span.h"

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace clipfast {

// Variances that differ by less than this share of the first pick's count as equal (reference.py says why).
constexpr double SPAN_EQUAL = 4e-15;

}  // namespace clipfast

#define KERNEL "span_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

template <typename Stored>
void pick(const Tensor& texts, const Tensor& factor, double floor, const Tensor& picks, const Tensor& variance,
          const Tensor& directions) {
  const int64_t groups = texts.shape[0], count = texts.shape[1], rank = texts.shape[2], size = picks.shape[1];
  const int64_t group_stride = texts.strides[0];
  const auto* first_texts = texts.as<const Stored>();
  const auto* first_factor = factor.as<const double>();
  auto* first_picks = picks.as<int64_t>();
  auto *first_variance = variance.as<Stored>(), *first_directions = directions.as<Stored>();
  SpanHead<Stored> shape = {};
  shape.text_stride = texts.strides[1];
  shape.rank_stride = texts.strides[2];
  shape.count = count;
  shape.rank = rank;
  shape.steps = std::min(size, rank);
  shape.floor = floor;
  shape.width = rounded_up(rank, 8);
  const int64_t in_tiles = rounded_up(count, SPAN_MAX_TILE), along = std::max(shape.width, shape.steps);
  const size_t bytes = Scratch::needs<Stored>(in_tiles * rank) + Scratch::needs<double>(in_tiles) +
                       2 * Scratch::needs<double>(shape.width * rank) +
                       Scratch::needs<double>(shape.steps * shape.width) + Scratch::needs<double>(along) +
                       2 * Scratch::needs<double>(shape.width) + Scratch::needs<double>(2 * rank);
  const auto kernel = PICK(span_head<Stored>);
  in_parallel("span", groups, 1, [=](int64_t begin, int64_t end) {
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
      head.texts = first_texts + group * group_stride;
      head.factor = first_factor + group * rank * rank;
      head.picks = first_picks + group * size;
      head.variance = first_variance + group * size;
      head.directions = first_directions + group * size * rank;
      kernel(head);
    }
    return true;
  });
}

}  // namespace

Reasons span_unsupported_reasons(const Tensor& texts, const Tensor& factor) {
  return Checks().readable({{"texts", &texts}, {"factor", &factor}}).reasons();
}

void span(const Tensor& texts, const Tensor& factor, double floor, const Tensor& picks, const Tensor& variance,
          const Tensor& directions) {
  Checks checks;
  checks.readable({{"texts", &texts}, {"factor", &factor}, {"picks", &picks}, {"variance", &variance}});
  checks.readable({{"directions", &directions}}).raise("span");
  checks.shape("texts", texts, {ANY, ANY, ANY}).shape("picks", picks, {ANY, ANY}).raise("span");
  const int64_t groups = texts.shape[0], rank = texts.shape[2], size = picks.shape[1];
  checks.dtype("texts", texts, {Dtype::float32, Dtype::float64});
  checks.dtype("factor", factor, {Dtype::float64}).shape("factor", factor, {groups, rank, rank}).contiguous("factor", factor);
  checks.dtype("picks", picks, {Dtype::int64}).shape("picks", picks, {groups, size}).contiguous("picks", picks);
  checks.same_dtype("variance", variance, "texts", texts).shape("variance", variance, {groups, size});
  checks.same_dtype("directions", directions, "texts", texts).shape("directions", directions, {groups, size, rank});
  checks.contiguous("variance", variance).contiguous("directions", directions).raise("span");
  if (groups == 0 || rank == 0 || texts.shape[1] == 0) return;
  if (texts.dtype == Dtype::float64)
    pick<double>(texts, factor, floor, picks, variance, directions);
  else
    pick<float>(texts, factor, floor, picks, variance, directions);
}

}  // namespace clipfast
