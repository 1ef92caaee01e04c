// Fills a Tensor from a Python object, for pybind11.
//
// Torch hands out a table of C functions for this (torch.Tensor.__dlpack_c_exchange_api__, from torch 2.10 on): one of
// them writes pointer, shape, strides, dtype and device of a tensor into a DLTensor, in 60 ns and without a header of
// torch's. Reading the same from attributes takes 450 ns. Only the negative bit is not in it and is asked of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace clipfast {

// DLPack 1.x, as far as it is used here (https://github.com/dmlc/dlpack).
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchange {
  struct {
    uint32_t major, minor;
  } version;
  const DLPackExchange* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* object, DLTensor* out);  // 0, or −1 with a Python exception set
  void* current_work_stream;
};

constexpr int32_t DEVICE_CPU = 1;

// Set once, before anything is computed.
inline PyTypeObject* tensor_type = nullptr;
inline int (*tensor_from_py_object)(void*, DLTensor*) = nullptr;
inline PyObject* is_neg_name = nullptr;

inline void use_tensor_type(const pybind11::type& type) {
  const pybind11::object capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    throw std::runtime_error("torch.Tensor has no __dlpack_c_exchange_api__: torch 2.11 or later is needed");
  const auto* api =
      static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_py_object == nullptr)
    throw std::runtime_error("torch.Tensor.__dlpack_c_exchange_api__ is not of DLPack 1");
  tensor_from_py_object = api->tensor_from_py_object;
  is_neg_name = PyUnicode_InternFromString("is_neg");
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
}

inline Dtype dtype_of(const DLTensor& view) {
  constexpr uint8_t is_int = 0, is_float = 2, is_bfloat = 4;
  if (view.lanes != 1) return Dtype::other;
  if (view.type_code == is_float) {
    if (view.bits == 32) return Dtype::float32;
    if (view.bits == 16) return Dtype::float16;
    if (view.bits == 64) return Dtype::float64;
  }
  if (view.type_code == is_bfloat && view.bits == 16) return Dtype::bfloat16;
  return view.type_code == is_int && view.bits == 64 ? Dtype::int64 : Dtype::other;
}

// Of a tensor that torch does not describe as memory.
inline std::string why_not_described(pybind11::handle tensor) {
  const auto text = [&](const char* attribute) { return std::string(pybind11::str(tensor.attr(attribute))); };
  if (text("device") != "cpu") return "is on " + text("device");
  if (text("layout") != "torch.strided") return "is not strided (" + text("layout") + ")";
  if (tensor.attr("is_quantized").cast<bool>()) return "is " + text("dtype");
  return "has no memory of its own";  // batched by torch.vmap, say
}

inline void fill(Tensor& tensor, pybind11::handle source) {
  DLTensor view;
  if (tensor_from_py_object(source.ptr(), &view) != 0) {
    PyErr_Clear();
    tensor.unreadable = why_not_described(source);
    return;
  }
  tensor.data = static_cast<char*>(view.data) + view.byte_offset;
  tensor.ndim = view.ndim;
  tensor.shape = view.shape;
  tensor.strides = view.strides;
  tensor.dtype = dtype_of(view);
  tensor.type_code = view.type_code;
  tensor.bits = view.bits;
  const uint64_t bytes = (view.bits * view.lanes + 7) / 8;
  if (view.device_type != DEVICE_CPU) {
    tensor.unreadable = "is on " + std::string(pybind11::str(source.attr("device")));
  } else if (view.data == nullptr && tensor.numel() != 0) {
    tensor.unreadable = "has no memory of its own";  // torch.func.functionalize, zeros that torch never wrote
  } else if (bytes && reinterpret_cast<uintptr_t>(tensor.data) % bytes != 0) {
    tensor.unreadable = "is not aligned to its elements";
  } else {
    const auto negated = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(source.ptr(), is_neg_name));
    if (!negated) throw pybind11::error_already_set();
    if (negated.ptr() != Py_False) tensor.unreadable = "is a negated view";
  }
}

}  // namespace clipfast

namespace pybind11::detail {

template <>
struct type_caster<clipfast::Tensor> {
  PYBIND11_TYPE_CASTER(clipfast::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (clipfast::tensor_type == nullptr || !PyObject_TypeCheck(source.ptr(), clipfast::tensor_type)) return false;
    clipfast::fill(value, source);
    return true;
  }
};

}  // namespace pybind11::detail
