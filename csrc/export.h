// Functions that Python calls: C names, raw pointers, nothing thrown.
#pragma once

#define CLIPFAST_EXPORT extern "C" __attribute__((visibility("default")))

namespace clipfast {

// What they return; Python knows them by number (kernels/native.py).
enum Status { done = 0, no_memory = 1, pool_failed = 2 };

}  // namespace clipfast
