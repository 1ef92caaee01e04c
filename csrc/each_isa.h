// Compiles the file named by KERNEL once per instruction set, each in a namespace of its own.
//
// Everything is built with plain flags, so that no instruction slips into code that runs anywhere. What may use more
// says so per function: kernels mark their functions TARGET, helpers INLINE, and find vectors of VECTOR_BYTES. No lambda
// and nothing of the standard library inside: they would not carry the mark. PICK(f) is f for the CPU at hand.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

// The width is for loops that GCC makes vectors of by itself; clang would ignore a target for the sake of it.
#if defined(__clang__)
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif

#define INLINE TARGET static inline __attribute__((always_inline))

#define TARGET
#define VECTOR_BYTES 16  // SSE2 and NEON, which every CPU of these kinds has
namespace clipfast::generic {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::generic
#undef TARGET
#undef VECTOR_BYTES

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
namespace clipfast::avx2 {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::avx2
#undef TARGET
#undef VECTOR_BYTES

#define TARGET __attribute__((target(AVX512)))
#define VECTOR_BYTES 64
namespace clipfast::avx512 {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::avx512
#undef TARGET
#undef VECTOR_BYTES

#define PICK(...)                              \
  (::clipfast::isa() >= ::clipfast::Isa::avx512 \
       ? ::clipfast::avx512::__VA_ARGS__        \
       : ::clipfast::isa() == ::clipfast::Isa::avx2 ? ::clipfast::avx2::__VA_ARGS__ : ::clipfast::generic::__VA_ARGS__)

#else

#define PICK(...) (::clipfast::generic::__VA_ARGS__)

#endif
