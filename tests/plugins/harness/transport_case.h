#pragma once

#include "case.h"

namespace sws {

// Reads weights, x0 (and x1), writes y0 (and y1).
void run_transport_case(const Case& test);

}  // namespace sws
