// Which instruction set the kernels run with: the best that the CPU has, or less where a caller caps it.
#pragma once

namespace clipfast {

// In ascending order; Python names them in the same order (kernels/native.py).
enum class Isa { generic, avx2, avx512, avx512_bf16 };

Isa isa();

}  // namespace clipfast
