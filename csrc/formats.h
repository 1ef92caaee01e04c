// Numbers of 16 bits. What is computed with them is widened to float before, exactly, and rounded once afterwards.
#pragma once

#include <cstdint>
#include <cstring>

namespace clipfast {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// As Python numbers what a tensor holds (kernels/native_ops.py).
enum Format { float32 = 0, bfloat16 = 1, float16 = 2 };

// Calls body with a pointer whose type says the format.
template <typename Body>
int with_format(int format, const Body& body) {
  switch (format) {
    case bfloat16:
      return body(static_cast<Bfloat16*>(nullptr));
    case float16:
      return body(static_cast<Half*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

// Where no instruction does it.

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
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7FFFu) << 13;
  const bool beyond = (x.bits & 0x7C00u) == 0x7C00u;  // infinite or NaN
  const float size = beyond ? from_bits(rest | 0x7F800000u) : from_bits(rest) * 0x1p112f;
  return from_bits(to_bits(size) | sign);
}

// To the nearest, ties to even.
inline Half narrowed(float x) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, size = to_bits(x) & 0x7FFFFFFFu;
  uint32_t bits;
  if (size > 0x7F800000u)
    bits = 0x7E00u;
  else if (size >= 0x477FF000u)  // 65520, from where on the nearest is infinite
    bits = 0x7C00u;
  else if (size < 0x38800000u)  // 2⁻¹⁴: the sum with ½ has the unit of float16's last place
    bits = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f);
  else
    bits = (size + 0xFFFu + (size >> 13 & 1u) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>(sign | bits)};
}

}  // namespace clipfast
