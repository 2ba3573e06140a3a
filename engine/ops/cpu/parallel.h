// Loops over pieces, as the files that cut operations into pieces write them.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace whet {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs body(index) for each index in [0, count) on the pool; `in_order` as parallel_for has it.
template <typename F>
void in_parallel(int64_t count, F body, bool in_order = false) {
  if (count == 1) return body(0);
  parallel_for([](void* context, int64_t index) { (*static_cast<F*>(context))(index); }, &body, count, in_order);
}

}  // namespace whet
