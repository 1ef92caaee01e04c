#include "isa.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace clipfast {
namespace {

constexpr const char* NAMES[] = {"generic", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)
// Conversions of float16, which older compilers' __builtin_cpu_supports does not know.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks the operating system whether it saves the registers.
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

std::atomic<Isa> current{best()};

}  // namespace

Isa isa() { return current.load(std::memory_order_relaxed); }

std::string isa_name() { return NAMES[static_cast<int>(isa())]; }

std::string limit_isa(const std::string& name) {
  const auto* end = NAMES + sizeof NAMES / sizeof *NAMES;
  const auto* match = std::find(NAMES, end, name);
  if (match == end) throw std::invalid_argument("there is no instruction set '" + name + "'");
  current.store(std::min(best(), static_cast<Isa>(match - NAMES)));
  return isa_name();
}

}  // namespace clipfast
