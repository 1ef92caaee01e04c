#include "activation.h"

#include <algorithm>
#include <type_traits>

#include "export.h"
#include "pool.h"

#define KERNEL "activation_kernel.h"
#include "each_isa.h"

namespace clipfast {
namespace {

constexpr int64_t ENTRIES = 16384;  // fewer are not worth a thread of their own

template <typename From, typename To>
int activation_of(const Activated<From, To>& whole) {
  const auto kernel = PICK(activated<From, To>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES / std::max<int64_t>(1, whole.columns));
  return in_parallel(whole.rows, grain, [=](int64_t begin, int64_t end) {
    Activated<From, To> part = whole;
    part.from = whole.from + begin * whole.from_stride;
    part.to = whole.to + begin * whole.to_stride;
    part.rows = end - begin;
    kernel(part);
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// to ← f(from + bias), both [rows, columns] with rows a stride (in elements) apart; bias [columns] of float or nullptr.
// from is of to's format or of float; where they are the same, `to` may be `from`.
CLIPFAST_EXPORT int clipfast_activation(int from_format, const void* from, int64_t from_stride, const float* bias,
                                        int64_t rows, int64_t columns, int activation, int to_format, void* to,
                                        int64_t to_stride) {
  return clipfast::with_format(to_format, [=](auto* of) {
    using To = std::remove_pointer_t<decltype(of)>;
    const auto run = [=](auto* typed) {
      using From = std::remove_pointer_t<decltype(typed)>;
      return clipfast::activation_of(clipfast::Activated<From, To>{
          static_cast<const From*>(from), from_stride, bias, rows, columns, activation, static_cast<To*>(to), to_stride});
    };
    return from_format == to_format ? run(of) : run(static_cast<float*>(nullptr));
  });
}
