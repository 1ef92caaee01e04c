#include "moments.h"

#include "operations.h"
#include "pool.h"

#define KERNEL "moments_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

template <typename Code>
void add_moments(const Tensor& codes, const Tensor& shared, const Tensor& centre, const Tensor& total,
                 const Tensor& second) {
  const int64_t groups = codes.shape[1], group_stride = codes.strides[1];
  MomentsHead<Code> shape = {};
  shape.codes = codes.as<const Code>();
  shape.code_image_stride = codes.strides[0];
  shape.code_entry_stride = codes.strides[2];
  shape.shared = shared.as<const Code>();
  shape.shared_image_stride = shared.strides[0];
  shape.shared_entry_stride = shared.strides[1];
  shape.centre = centre.as<const Code>();
  shape.images = codes.shape[0];
  shape.entries = codes.shape[2];
  shape.columns = total.shape[1];
  shape.total = total.as<double>();
  shape.second = second.as<double>();
  shape.width = (shape.columns + MOMENTS_ROWS + MOMENTS_COLUMNS - 1) / MOMENTS_COLUMNS * MOMENTS_COLUMNS;
  const auto kernel = PICK(moments_head<Code>);
  in_parallel("moments", groups, 1, [=](int64_t begin, int64_t end) {
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

}  // namespace

Reasons moments_unsupported_reasons(const Tensor& codes, const Tensor& shared, const Tensor& centre, const Tensor& total,
                                    const Tensor& second) {
  Checks checks;
  checks.readable({{"codes", &codes}, {"shared", &shared}, {"centre", &centre}, {"total", &total}, {"second", &second}});
  if (!checks.passed()) return checks.reasons();
  const Checks::Named read[] = {{"codes", &codes}, {"shared", &shared}, {"centre", &centre}};
  for (const auto& [name, tensor] : read)
    if (!tensor->is_floating_point())
      checks.require(false, name + (" is " + dtype_name(*tensor)) + ", expected floating point");
  return checks.reasons();
}

void moments(const Tensor& codes, const Tensor& shared, const Tensor& centre, const Tensor& total, const Tensor& second) {
  Checks checks;
  checks.readable({{"codes", &codes}, {"shared", &shared}, {"centre", &centre}, {"total", &total}, {"second", &second}});
  checks.raise("moments");
  checks.shape("codes", codes, {ANY, ANY, ANY}).shape("total", total, {ANY, ANY}).raise("moments");
  const int64_t images = codes.shape[0], groups = codes.shape[1], columns = total.shape[1];
  checks.shape("shared", shared, {images, columns - codes.shape[2]}).shape("centre", centre, {groups, columns});
  checks.shape("total", total, {groups, columns}).shape("second", second, {groups, columns, columns});
  checks.dtype("codes", codes, {Dtype::float32, Dtype::float64});
  checks.same_dtype("shared", shared, "codes", codes).same_dtype("centre", centre, "codes", codes);
  checks.dtype("total", total, {Dtype::float64}).dtype("second", second, {Dtype::float64});
  checks.contiguous("centre", centre).contiguous("total", total).contiguous("second", second).raise("moments");
  if (images == 0 || columns == 0) return;
  if (codes.dtype == Dtype::float64)
    add_moments<double>(codes, shared, centre, total, second);
  else
    add_moments<float>(codes, shared, centre, total, second);
}

}  // namespace clipfast
