// The instruction set that the kernels run with: the best that the CPU has, or less where a caller caps it.
#pragma once

#include <string>

namespace clipfast {

enum class Isa { generic, avx2, avx512, avx512_bf16 };  // in ascending order

Isa isa();

// By name, for Python.
std::string isa_name();

// Everything that starts from now on runs with at most this instruction set. Returns the one in use then.
std::string limit_isa(const std::string& name);

}  // namespace clipfast
