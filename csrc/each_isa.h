// Compiles the file named by KERNEL once per instruction set, each time in a namespace of its own.
//
// The library is built with plain flags, so that code for every CPU contains no newer instructions. Instruction sets are
// enabled per function: kernels mark their functions TARGET and their helpers INLINE, and use vectors of VECTOR_BYTES.
// They contain no lambdas and nothing of the standard library, which would not carry the mark. INTRINSICS is the width in
// bytes of the intrinsics that may be used, 0 for none. PICK(f) is f for the instruction set in use.
//
// With CLIPFAST_EMULATE_AVX512 the namespaces of AVX-512 keep their vector width, and with it their tiles, tails and
// scratch memory, but are compiled to AVX2 without intrinsics: `make sanitize` tests them so on a CPU without AVX-512.
//
// A file that defines KERNEL_USES_BF16 first gets a fourth namespace, in which BF16_INSTRUCTIONS is defined, and
// PICK_BF16(f). Only the templates that are picked from a namespace are instantiated in it.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

// The preferred width is for loops that GCC vectorizes; clang ignores a whole target string that contains it.
#if defined(__clang__)
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif

#define INLINE TARGET static inline __attribute__((always_inline))

#define TARGET
#define VECTOR_BYTES 16  // SSE2 or NEON, which every x86-64 or ARM64 CPU has
#define INTRINSICS 0
namespace clipfast::generic {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::generic
#undef TARGET
#undef VECTOR_BYTES
#undef INTRINSICS

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR_BYTES 32
#define INTRINSICS 32
namespace clipfast::avx2 {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::avx2
#undef TARGET
#undef VECTOR_BYTES
#undef INTRINSICS

#define VECTOR_BYTES 64
#if defined(CLIPFAST_EMULATE_AVX512)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INTRINSICS 0
#else
#define TARGET __attribute__((target(AVX512)))
#define INTRINSICS 64
#endif
namespace clipfast::avx512 {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::avx512
#undef TARGET
#undef VECTOR_BYTES
#undef INTRINSICS

#define PICK(...)                                   \
  (::clipfast::isa() >= ::clipfast::Isa::avx512     \
       ? ::clipfast::avx512::__VA_ARGS__            \
       : ::clipfast::isa() == ::clipfast::Isa::avx2 \
             ? ::clipfast::avx2::__VA_ARGS__        \
             : ::clipfast::generic::__VA_ARGS__)

#ifdef KERNEL_USES_BF16
#define VECTOR_BYTES 64
#if defined(CLIPFAST_EMULATE_AVX512)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INTRINSICS 0
#else
#define TARGET __attribute__((target("avx512bf16," AVX512)))
#define INTRINSICS 64
#define BF16_INSTRUCTIONS
#endif
namespace clipfast::avx512_bf16 {
#include "vectors.h"
#include KERNEL
}  // namespace clipfast::avx512_bf16
#undef TARGET
#undef VECTOR_BYTES
#undef INTRINSICS
#undef BF16_INSTRUCTIONS

// Without AVX512-BF16 its instructions are emulated, on AVX-512 by the code for AVX2.
#define PICK_BF16(...)                                 \
  (::clipfast::isa() == ::clipfast::Isa::avx512_bf16   \
       ? ::clipfast::avx512_bf16::__VA_ARGS__          \
       : ::clipfast::isa() >= ::clipfast::Isa::avx2    \
             ? ::clipfast::avx2::__VA_ARGS__           \
             : ::clipfast::generic::__VA_ARGS__)
#endif

#else

#define PICK(...) (::clipfast::generic::__VA_ARGS__)
#define PICK_BF16(...) PICK(__VA_ARGS__)

#endif
