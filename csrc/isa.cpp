#include "isa.h"

#include <algorithm>
#include <atomic>

#include "export.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace clipfast {
namespace {

#if defined(__x86_64__)
// Conversions of float16, which older compilers' tests do not know.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // libgcc's and compiler-rt's tests ask the operating system, too, whether it saves the registers.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return Isa::generic;
#if defined(CLIPFAST_EMULATE_AVX512)  // each_isa.h
  return Isa::avx512_bf16;
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::generic;
#endif
}

std::atomic<int> current{static_cast<int>(best())};

}  // namespace

Isa isa() { return static_cast<Isa>(current.load(std::memory_order_relaxed)); }

}  // namespace clipfast

// The instruction set in use.
CLIPFAST_EXPORT int clipfast_isa() { return static_cast<int>(clipfast::isa()); }

// Runs everything that starts from now on with at most this instruction set, and returns which that is.
CLIPFAST_EXPORT int clipfast_limit_isa(int most) {
  const int best = static_cast<int>(clipfast::best());
  clipfast::current.store(std::max(0, std::min(most, best)));
  return clipfast::current.load();
}
