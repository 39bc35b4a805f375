#pragma once

#include "case.h"

namespace sws {

// Small functions over whole ranges: number formats (x -> float16, bfloat16 bits and back) and diamond offsets.
void run_arithmetic_case(const Case& test);

}  // namespace sws
