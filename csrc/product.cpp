#include "product.h"

#include <algorithm>
#include <limits>
#include <mutex>

#include "activation.h"
#include "operations.h"
#include "pool.h"

namespace clipfast {
namespace {

constexpr int64_t UNIT = 16;  // parts start at multiples of this many rows and columns

// CBLAS: row-major, with 32-bit integers.
constexpr int ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112;
using Sgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a,
                       int lda, const float* b, int ldb, float beta, float* c, int ldc);
using GetThreads = int (*)();
using SetThreads = void (*)(int);

Sgemm sgemm = nullptr;
GetThreads get_threads = nullptr;
SetThreads set_threads = nullptr;

// While one of these lives, the BLAS computes every product on the thread that asks for it. Its number of threads is
// one for the whole process: the first to come remembers it, the last to go restores it.
class OneThreadEach {
 public:
  OneThreadEach() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (users_++ > 0) return;
    before_ = get_threads();
    if (before_ != 1) set_threads(1);
  }
  ~OneThreadEach() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (--users_ == 0 && before_ != 1) set_threads(before_);
  }
  OneThreadEach(const OneThreadEach&) = delete;
  OneThreadEach& operator=(const OneThreadEach&) = delete;

 private:
  inline static std::mutex lock_;
  inline static int users_ = 0;
  inline static int before_ = 1;
};

// An axis cut into a power of two of parts of about this size, but `least` at least, so that two, four or eight threads
// get the same share.
struct Cut {
  Cut(int64_t size, int64_t part, int64_t least) : count(least) {
    while (static_cast<double>(size) / static_cast<double>(count) > 1.414 * static_cast<double>(part)) count *= 2;
    step = (size + count * UNIT - 1) / (count * UNIT) * UNIT;
    count = (size + step - 1) / step;
  }

  int64_t count, step;
};

constexpr int64_t LARGEST = std::numeric_limits<int>::max();

bool fits(const Tensor& matrix) {
  return matrix.shape[0] <= LARGEST && matrix.shape[1] <= LARGEST && matrix.strides[0] <= LARGEST;
}

// The distance of rows: a matrix of one row may have any stride, and BLAS rejects one below the number of columns.
int row_stride(const Tensor& matrix) {
  return static_cast<int>(matrix.shape[0] == 1 ? std::max<int64_t>(1, matrix.shape[1]) : matrix.strides[0]);
}

}  // namespace

void use_blas(uintptr_t sgemm_address, uintptr_t get_threads_address, uintptr_t set_threads_address) {
  sgemm = reinterpret_cast<Sgemm>(sgemm_address);
  get_threads = reinterpret_cast<GetThreads>(get_threads_address);
  set_threads = reinterpret_cast<SetThreads>(set_threads_address);
}

void product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const std::optional<std::string>& activation, const Tensor& out, int64_t part_rows, int64_t part_columns) {
  Checks checks;
  checks.require(sgemm != nullptr && get_threads != nullptr && set_threads != nullptr, "no BLAS is in use");
  checks.readable({{"x", &x}, {"weight", &weight}, {"bias", pointer_to(bias)}, {"out", &out}}).raise("product");
  checks.shape("x", x, {ANY, ANY}).shape("weight", weight, {ANY, ANY}).raise("product");
  const int64_t rows = x.shape[0], depth = x.shape[1], columns = weight.shape[0];
  checks.shape("weight", weight, {columns, depth}).shape("out", out, {rows, columns}).raise("product");
  for (const auto& [name, matrix] : {Checks::Named{"x", &x}, {"weight", &weight}, {"out", &out}})
    checks.dtype(name, *matrix, {Dtype::float32})
        .last_axis_contiguous(name, *matrix)
        .require(fits(*matrix) && (matrix->shape[0] <= 1 || matrix->strides[0] >= matrix->shape[1]),
                 std::string(name) + " has rows that overlap, or is too large for 32 bits");
  if (bias)
    checks.shape("bias", *bias, {columns}).dtype("bias", *bias, {Dtype::float32}).contiguous("bias", *bias);
  checks.require(depth > 0, "x has no columns");
  checks.require(part_rows > 0 && part_columns > 0, "a part has no rows or no columns").raise("product");
  const Activation kind = activation_named(activation);
  if (rows == 0 || columns == 0) return;

  const float* left = x.as<const float>();
  const float* right = weight.as<const float>();
  const float* shift = bias ? bias->as<const float>() : nullptr;
  float* result = out.as<float>();
  const int left_stride = row_stride(x), right_stride = row_stride(weight), stride = row_stride(out);
  const Cut row_cut(rows, part_rows, 1), column_cut(columns, part_columns, 2);

  const OneThreadEach one_thread_each;
  // The parts depend on the shape alone: where a part ends, the BLAS may round differently. Neighbours share columns.
  in_parallel("product", row_cut.count * column_cut.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number % row_cut.count * row_cut.step, column = number / row_cut.count * column_cut.step;
      const int64_t height = std::min(row_cut.step, rows - row);
      const int64_t width = std::min(column_cut.step, columns - column);
      float* part = result + row * stride + column;
      sgemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, static_cast<int>(height), static_cast<int>(width),
            static_cast<int>(depth), 1, left + row * left_stride, left_stride, right + column * right_stride,
            right_stride, 0, part, stride);
      if (shift != nullptr || kind != Activation::identity)  // while the part is in the cache
        activate_part({part, stride, shift == nullptr ? nullptr : shift + column, height, width, kind, part,
                       stride});
    }
    return true;
  });
}

}  // namespace clipfast
