// Work spread over torch's own threads, and memory for each of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "export.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace clipfast {

using Range = void (*)(int64_t begin, int64_t end, void* context);

// torch_parallel_for of torch's stable C interface (2.10 and later), as Python found it; nullptr for one thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);
extern ParallelFor parallel_for;

// Calls body(begin, end) on parts of 0 … count, none shorter than `grain` unless it is the last. Parts are independent:
// results never depend on how many there are. `body` returns false to report that it had no memory.
template <typename Body>
int in_parallel(int64_t count, int64_t grain, const Body& body) {
  struct Context {
    const Body& body;
    bool failed;  // only ever set: threads that race write the same
  } context{body, false};
  const Range range = [](int64_t begin, int64_t end, void* given) {
    auto* context = static_cast<Context*>(given);
    if (!context->body(begin, end)) __atomic_store_n(&context->failed, true, __ATOMIC_RELAXED);
  };
  if (count <= 0) return done;
  if (parallel_for == nullptr)
    range(0, count, &context);
  else if (parallel_for(0, count, grain, range, &context) != 0)
    return pool_failed;
  return context.failed ? no_memory : done;
}

// Memory of one thread, handed out piece by piece; every piece starts on a cache line. Under AddressSanitizer a line
// after each piece, and what is left of its last one, may not be touched: what leaves its piece would else find the next.
class Scratch {
 public:
  static constexpr size_t line = 64;

  explicit Scratch(size_t bytes) : start_(static_cast<char*>(std::aligned_alloc(line, rounded(bytes)))), next_(start_) {}
  ~Scratch() { std::free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  explicit operator bool() const { return start_ != nullptr; }

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += needs<T>(count);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(piece + count, next_ - reinterpret_cast<char*>(piece + count));
#endif
    return piece;
  }

  // How many bytes take<T>(count) uses up.
  template <typename T>
  static size_t needs(int64_t count) {
    return rounded(static_cast<size_t>(count) * sizeof(T)) + between;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t between = line;
#else
  static constexpr size_t between = 0;
#endif

  static size_t rounded(size_t bytes) { return (bytes + line - 1) / line * line; }

  char* start_;
  char* next_;
};

}  // namespace clipfast
