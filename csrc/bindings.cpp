// The Python module clipfast.kernels._native. clipfast/kernels/native.py loads it and has its signatures for type checkers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "isa.h"
#include "operations.h"
#include "pool.h"
#include "product.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_native, module) {
  using namespace clipfast;
  const py::call_guard<py::gil_scoped_release> without_gil;

  module.doc() = "The operations in C++ for the CPU. clipfast.kernels.native loads it.";

  module.def(
      "use_torch",
      [](const py::type& tensor, std::uintptr_t parallel_for_address) {
        use_tensor_type(tensor);
        parallel_for = reinterpret_cast<ParallelFor>(parallel_for_address);
      },
      "tensor"_a, "parallel_for"_a, "Hands over torch.Tensor and the address of torch_parallel_for, before any call.");
  module.def("use_blas", &use_blas, "sgemm"_a, "get_threads"_a, "set_threads"_a,
             "Hands over the addresses of a BLAS's functions, before `product`.");
  module.def("isa", &isa_name, "The instruction set in use.");
  module.def("limit_isa", &limit_isa, "name"_a, "Caps the instruction set; returns the one in use then.");
  module.def("emulate_bf16_pairs", &emulate_bf16_pairs, "enabled"_a);

  module.def("activation", &activation, "x"_a, "bias"_a, "activation"_a, "out"_a, without_gil);
  module.def("attention", &attention, "qkv"_a, "mean"_a, "out"_a, "alpha"_a, without_gil);
  module.def("add_layer_norm", &add_layer_norm, "x"_a, "delta"_a, "weight"_a, "bias"_a, "eps"_a, "out"_a, without_gil);
  module.def("moments", &moments, "codes"_a, "shared"_a, "centre"_a, "total"_a, "second"_a, without_gil);
  module.def("product", &product, "x"_a, "weight"_a, "bias"_a, "activation"_a, "out"_a, "part_rows"_a,
             "part_columns"_a, without_gil);
  module.def("query_row", &query_row, "query"_a, "key"_a, "value"_a, "z"_a, "alpha"_a, without_gil);
  module.def("rotate", &rotate, "x"_a, "cos"_a, "sin"_a, "halves"_a, without_gil);
  module.def("span", &span, "texts"_a, "factor"_a, "floor"_a, "picks"_a, "variance"_a, "directions"_a, without_gil);
  module.def("text_maps", &text_maps, "alpha"_a, "value"_a, "basis"_a, "heads"_a, "out"_a, without_gil);
  module.def("weighted_rows", &weighted_rows, "qkv"_a, "weights"_a, "out"_a, without_gil);

  module.def("attention_unsupported_reasons", &attention_unsupported_reasons, "qkv"_a);
  module.def("add_layer_norm_unsupported_reasons", &add_layer_norm_unsupported_reasons, "x"_a, "delta"_a, "weight"_a,
             "bias"_a);
  module.def("linear_unsupported_reasons", &linear_unsupported_reasons, "x"_a, "weight"_a, "bias"_a);
  module.def("linear_activation_unsupported_reasons", &linear_activation_unsupported_reasons, "x"_a, "weight"_a,
             "bias"_a);
  module.def("moments_unsupported_reasons", &moments_unsupported_reasons, "codes"_a, "shared"_a, "centre"_a, "total"_a,
             "second"_a);
  module.def("query_row_unsupported_reasons", &query_row_unsupported_reasons, "query"_a, "key"_a, "value"_a);
  module.def("rotate_unsupported_reasons", &rotate_unsupported_reasons, "x"_a, "cos"_a, "sin"_a);
  module.def("span_unsupported_reasons", &span_unsupported_reasons, "texts"_a, "factor"_a);
  module.def("text_maps_unsupported_reasons", &text_maps_unsupported_reasons, "alpha"_a, "value"_a, "text_basis"_a,
             "out"_a, "heads"_a);
  module.def("layered_text_maps_unsupported_reasons", &layered_text_maps_unsupported_reasons, "alpha"_a, "values"_a,
             "text_basis"_a, "heads"_a);
  module.def("text_maps_from_tokens_unsupported_reasons", &text_maps_from_tokens_unsupported_reasons, "alpha"_a,
             "tokens"_a, "value_weight"_a, "value_bias"_a, "text_basis"_a, "out"_a);
  module.def("weighted_rows_unsupported_reasons", &weighted_rows_unsupported_reasons, "qkv"_a, "weights"_a);
}
