// Floats of 16 bits. Kernels widen them to float32 before they compute, exactly, and round results once.
#pragma once

#include <cstdint>
#include <cstring>

#include "tensor.h"

namespace clipfast {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// The dtypes that a kernel's `Stored` may be.
[[maybe_unused]] constexpr auto STORED = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// Calls body with a null pointer whose type is that of the dtype, one of STORED.
template <typename Body>
auto with_stored(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::bfloat16:
      return body(static_cast<Bfloat16*>(nullptr));
    case Dtype::float16:
      return body(static_cast<Half*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

// Conversions of one float16, for instruction sets that have none.

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widened(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7FFFu) << 13;
  const bool not_finite = (x.bits & 0x7C00u) == 0x7C00u;
  const float size = not_finite ? from_bits(magnitude | 0x7F800000u) : from_bits(magnitude) * 0x1p112f;
  return from_bits(to_bits(size) | sign);
}

// To the nearest, ties to even.
inline Half narrowed(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, magnitude = to_bits(x) & 0x7FFFFFFFu;
  uint32_t bits;
  if (magnitude > 0x7F800000u)  // NaN
    bits = 0x7E00u;
  else if (magnitude >= 0x477FF000u)  // 65520, the smallest that rounds to infinity
    bits = 0x7C00u;
  else if (magnitude < 0x38800000u)  // below 2⁻¹⁴, denormal: adding ½ rounds to the unit of float16's last place
    bits = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  else
    bits = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>(sign | bits)};
}

}  // namespace clipfast
