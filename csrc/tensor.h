// A torch tensor as the functions here read it: a pointer with shape, strides and dtype. Not owned, valid for one call.
// tensor_caster.h fills it from Python; nothing else here knows Python or torch.
#pragma once

#include <cstdint>
#include <string>

namespace clipfast {

enum class Dtype { float32, bfloat16, float16, float64, int64, other };

struct Tensor {
  void* data = nullptr;
  int64_t ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements
  Dtype dtype = Dtype::other;
  uint8_t type_code = 0, bits = 0;  // the dtype as DLPack has it, for dtypes that nothing here computes with
  std::string unreadable;           // why its memory cannot be read here; empty where it can. The rest is unset otherwise.

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t axis = 0; axis < ndim; ++axis) count *= shape[axis];
    return count;
  }

  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t axis = ndim - 1; axis >= 0; --axis) {
      if (shape[axis] > 1 && strides[axis] != expected) return false;
      expected *= shape[axis];
    }
    return true;
  }

  bool is_floating_point() const;
};

// As Python prints it: "torch.float32".
std::string name_of(Dtype dtype);
std::string dtype_name(const Tensor& tensor);

}  // namespace clipfast
