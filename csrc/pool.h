// Parallel loops on torch's own threads, and scratch memory for each thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace clipfast {

using Range = void (*)(int64_t begin, int64_t end, void* context);

// torch_parallel_for of torch's stable C interface (torch 2.10 and later). Python looks it up; nullptr for one thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range range, void* context);
inline ParallelFor parallel_for = nullptr;

// A MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const char* operation) : message_(std::string(operation) + ": not enough memory") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// Calls body(begin, end) on parts of 0 … count, none shorter than `grain` except the last. Parts are independent, so
// results do not depend on how many there are. `body` returns false where it could not allocate memory: no exception may
// leave it, for torch's frames lie between.
template <typename Body>
void in_parallel(const char* operation, int64_t count, int64_t grain, const Body& body) {
  struct Context {
    const Body& body;
    bool failed;  // only ever set to true, so threads may race
  } context{body, false};
  const Range range = [](int64_t begin, int64_t end, void* pointer) {
    auto* context = static_cast<Context*>(pointer);
    if (!context->body(begin, end)) __atomic_store_n(&context->failed, true, __ATOMIC_RELAXED);
  };
  if (count <= 0) return;
  if (parallel_for == nullptr)
    range(0, count, &context);
  else if (parallel_for(0, count, grain, range, &context) != 0)
    throw std::runtime_error(std::string(operation) + ": torch's thread pool failed");
  if (context.failed) throw OutOfMemory(operation);
}

// The memory of one thread, handed out piece by piece; every piece starts on a cache line. Under AddressSanitizer each
// piece is followed by a line that may not be touched, so that an overrun does not land in the next piece.
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

  // The bytes that take<T>(count) uses up.
  template <typename T>
  static size_t needs(int64_t count) {
    return rounded(static_cast<size_t>(count) * sizeof(T)) + gap;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t gap = line;
#else
  static constexpr size_t gap = 0;
#endif

  static size_t rounded(size_t bytes) { return (bytes + line - 1) / line * line; }

  char* start_;
  char* next_;
};

}  // namespace clipfast
