#include "pool.h"

namespace clipfast {

ParallelFor parallel_for = nullptr;

}  // namespace clipfast

// Hands over torch_parallel_for, once, before anything is computed.
CLIPFAST_EXPORT void clipfast_use_pool(void* parallel_for) {
  clipfast::parallel_for = reinterpret_cast<clipfast::ParallelFor>(parallel_for);
}
