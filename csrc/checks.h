// What a function demands of its arguments. Failures are collected, so that a message names all of them.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace clipfast {

using Reasons = std::vector<std::string>;

constexpr int64_t ANY = -1;  // in an expected shape

class Checks {
 public:
  using Named = std::pair<const char*, const Tensor*>;  // nullptr for an argument that is None

  // Their memory can be read here. Nothing else may be asked of a tensor that fails.
  Checks& readable(std::initializer_list<Named> tensors);
  Checks& dtype(const char* name, const Tensor& tensor, std::initializer_list<Dtype> expected);
  Checks& same_dtype(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
  Checks& shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected);
  Checks& contiguous(const char* name, const Tensor& tensor);
  Checks& last_axis_contiguous(const char* name, const Tensor& tensor);
  // Anything else: `reason` where `holds` is false.
  Checks& require(bool holds, const std::string& reason);

  bool passed() const { return reasons_.empty(); }
  const Reasons& reasons() const { return reasons_; }

  // Throws std::invalid_argument, a ValueError in Python, unless everything passed.
  void raise(const char* operation) const;

 private:
  Reasons reasons_;
};

// Whether two entries may share memory: rows of a matrix that overlap, one row for all.
bool overlaps_itself(const Tensor& x);

// "[3, 4]".
std::string text_of(const int64_t* values, int64_t count);

}  // namespace clipfast
