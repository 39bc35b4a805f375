#pragma once

#include "case.h"

namespace sws {

// Small block programs with one fault each (or none), to see that the emulated block finds it.
void run_emulator_case(const Case& test);

}  // namespace sws
