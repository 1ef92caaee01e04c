// Which BLAS `product` calls.
#pragma once

#include <cstdint>

namespace clipfast {

// The addresses of cblas_sgemm with 32-bit integers, and of the functions that read and set the number of the BLAS's own
// threads.
void use_blas(uintptr_t sgemm, uintptr_t get_threads, uintptr_t set_threads);

}  // namespace clipfast
