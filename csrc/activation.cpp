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

template <typename Stored>
int activation_of(const Activated<Stored>& whole) {
  const auto kernel = PICK(activated<Stored>);
  const int64_t grain = std::max<int64_t>(1, ENTRIES / std::max<int64_t>(1, whole.columns));
  return in_parallel(whole.rows, grain, [=](int64_t begin, int64_t end) {
    Activated<Stored> part = whole;
    part.x = whole.x + begin * whole.columns;
    part.rows = end - begin;
    kernel(part);
    return true;
  });
}

}  // namespace
}  // namespace clipfast

// x ← f(x + bias), x [rows, columns] of a format and contiguous, bias [columns] of float or nullptr.
CLIPFAST_EXPORT int clipfast_activation(int format, void* x, const float* bias, int64_t rows, int64_t columns,
                                        int activation) {
  return clipfast::with_format(format, [=](auto* of) {
    using Stored = std::remove_pointer_t<decltype(of)>;
    return clipfast::activation_of(
        clipfast::Activated<Stored>{static_cast<Stored*>(x), bias, rows, columns, activation});
  });
}
