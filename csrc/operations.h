// The functions that Python calls (bindings.cpp), a file each. NAME computes, and throws std::invalid_argument where an
// argument is not what it expects; NAME_unsupported_reasons says of an operation's arguments, as a user passes them, why
// they cannot be computed with here. What Python prepares in between is a copy at most: another dtype, contiguous memory.
//
// Results are allocated by Python. Strides are free unless noted. The dtypes of `Stored` are float32, bfloat16 and float16;
// 16 bits are widened to float32, exactly, and rounded once afterwards. Results do not depend on the number of threads.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "tensor.h"

namespace clipfast {

using OptionalTensor = std::optional<Tensor>;

// The address of a tensor that may be None.
inline const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// out ← f(x + bias). x [rows, columns] in the dtype of `out` or float32, contiguous along one of its axes; bias [columns]
// float32, contiguous; out [rows, columns] of Stored with a contiguous last axis, and `x` itself where x is so, too.
// activation: "gelu", "gelu_tanh", "quick_gelu" or None.
void activation(const Tensor& x, const OptionalTensor& bias, const std::optional<std::string>& activation,
                const Tensor& out);

// out ← f(x · weightᵀ + bias) by the BLAS that `use_blas` was given, each part of the result on one of torch's threads. x
// [rows, depth], weight [columns, depth] and out [rows, columns] float32 with a contiguous last axis, at least one column
// in x; bias [columns] float32, contiguous; activation as above. A part has about so many rows and columns; where parts end,
// the BLAS may round differently.
void product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
             const std::optional<std::string>& activation, const Tensor& out, int64_t part_rows, int64_t part_columns);

// Attention of every image and head. qkv [images, tokens, 3, heads, width] of Stored with a contiguous last axis; out
// [images, tokens, heads, width] in its dtype, contiguous; alpha [images, heads, tokens] float32, contiguous: the first
// query's weights, or with `mean` the mean of the others'.
void attention(const Tensor& qkv, bool mean, const Tensor& out, const OptionalTensor& alpha);
Reasons attention_unsupported_reasons(const Tensor& qkv);

// For tests: attention of bfloat16 multiplies pairs on every instruction set, with the instructions of AVX512-BF16
// emulated where they are missing, or (false) only where the CPU has them. Returns the previous setting.
bool emulate_bf16_pairs(bool enabled);

// x ← x + delta and out ← its LayerNorm. x [..., width] of Stored with a contiguous last axis, its rows at two strides at
// most; delta the same, contiguous; weight and bias [width] float32, contiguous; out in the shape and dtype of x,
// contiguous.
void add_layer_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, const Tensor& bias, double eps,
                    const Tensor& out);
Reasons add_layer_norm_unsupported_reasons(const Tensor& x, const OptionalTensor& delta, const Tensor& weight,
                                           const Tensor& bias);

// Linear layers are torch's products with what `activation` does; all of them take any dtype, the same for all arguments,
// but those with an activation Stored.
Reasons linear_unsupported_reasons(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);
Reasons linear_activation_unsupported_reasons(const Tensor& x, const Tensor& weight, const Tensor& bias);

// Adds a batch to the moments of each group. codes [images, groups, entries], shared [images, columns − entries] and centre
// [groups, columns], all float32 or all float64; total [groups, columns] and second [groups, columns, columns] float64,
// contiguous.
void moments(const Tensor& codes, const Tensor& shared, const Tensor& centre, const Tensor& total, const Tensor& second);
Reasons moments_unsupported_reasons(const Tensor& codes, const Tensor& shared, const Tensor& centre, const Tensor& total,
                                    const Tensor& second);

// Attention of one query per image and head. query [images, heads, width] float32, contiguous; key and value [images,
// tokens, heads, width] of Stored with a contiguous last axis; z [images, heads, width] and alpha [images, heads, tokens]
// float32, contiguous.
void query_row(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& z, const Tensor& alpha);
Reasons query_row_unsupported_reasons(const Tensor& query, const Tensor& key, const Tensor& value);

// x ← x cos + turned(x) sin, where turned(x) is (−x₂, x₁) of two halves of a row, or of two neighbours. x [images, tokens,
// parts, heads, width] of Stored with a contiguous last axis of even length; cos and sin [heads or 1, tokens, width]
// float32, contiguous.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool halves);
Reasons rotate_unsupported_reasons(const Tensor& x, const Tensor& cos, const Tensor& sin);

// TEXTSPAN of each group. texts [groups, count, rank] float32 or float64; factor [groups, rank, rank] float64, contiguous;
// picks [groups, size] int64, variance [groups, size] and directions [groups, size, rank] in the dtype of `texts`,
// contiguous, filled with −1 and 0 before.
void span(const Tensor& texts, const Tensor& factor, double floor, const Tensor& picks, const Tensor& variance,
          const Tensor& directions);
Reasons span_unsupported_reasons(const Tensor& texts, const Tensor& factor);

// out[b, n] += Σ_h α[b, h, n] (v[b, n, h] · U[h]) over `heads` (int64, contiguous), or all. alpha [images, heads, tokens]
// float32; value [images, tokens, heads, width] of Stored with a contiguous last axis; basis [heads, width, padded]
// float32, contiguous, zeros from `texts` on, padded to a multiple of 32; out [images, tokens, texts] float32, contiguous.
void text_maps(const Tensor& alpha, const Tensor& value, const Tensor& basis, const OptionalTensor& heads,
               const Tensor& out);
Reasons text_maps_unsupported_reasons(const Tensor& alpha, const Tensor& value, const Tensor& text_basis,
                                      const Tensor& out, const OptionalTensor& heads);
Reasons layered_text_maps_unsupported_reasons(const Tensor& alpha, const std::vector<Tensor>& values,
                                              const Tensor& text_basis, const OptionalTensor& heads);
Reasons text_maps_from_tokens_unsupported_reasons(const Tensor& alpha, const Tensor& tokens, const Tensor& value_weight,
                                                  const Tensor& value_bias, const Tensor& text_basis, const Tensor& out);

// Weighted sums of every head's attention rows. qkv [images, tokens, 3, heads, width] of Stored with a contiguous last
// axis; weights [images, groups, tokens] and out [images, groups, heads, tokens] float32, contiguous.
void weighted_rows(const Tensor& qkv, const Tensor& weights, const Tensor& out);
Reasons weighted_rows_unsupported_reasons(const Tensor& qkv, const Tensor& weights);

}  // namespace clipfast
