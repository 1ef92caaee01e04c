// f(x + b) in place, the values read and written once. Included by each_isa.h, once per instruction set.

#include "floats.h"

template <int ACTIVATION>
INLINE Floats activate(Floats x) {
  if (ACTIVATION == gelu) return each(0.5f) * x * (each(1) + error_function(x * each(0.707106781f)));
  // ½ x (1 + tanh u) = x sigmoid(2u) with u = √(2/π) (x + 0.044715 x³)
  const Floats u = ACTIVATION == quick_gelu ? x * each(1.702f) : x * (each(1.59576912f) + each(0.0713548163f) * x * x);
  return x / (each(1) + exponential(-u));
}

template <int ACTIVATION, typename Stored>
TARGET static void activate_rows(const Activated<Stored>& given) {
  const int64_t columns = given.columns;
  for (int64_t row = 0; row < given.rows; ++row) {
    Stored* x = given.x + row * columns;
    for (int64_t i = 0; i < columns; i += WIDE) {
      Floats value = read(x + i, columns - i);
      if (given.bias != nullptr) value += read(given.bias + i, columns - i);
      write(x + i, activate<ACTIVATION>(value), columns - i);
    }
  }
}

template <typename Stored>
TARGET static void activated(const Activated<Stored>& given) {
  if (given.activation == gelu)
    activate_rows<gelu>(given);
  else if (given.activation == gelu_tanh)
    activate_rows<gelu_tanh>(given);
  else
    activate_rows<quick_gelu>(given);
}
