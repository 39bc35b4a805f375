#pragma once

#include "case.h"

namespace sws {

// Reads q, k, kp and the per-sample scalars, runs every launch of the guard, writes alpha_k, a_v and the states.
void run_guard_case(const Case& test);

}  // namespace sws
