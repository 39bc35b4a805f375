// All launches of the key guard on the emulated block.
#pragma once

#include "key_guard/problem.h"

namespace sws {

struct GuardRun {
  GuardProblem problem;
  int row_warps;       // warps with different rows
  int stages;          // 0: scalar kernels
  int blocks;          // grid size of the rounds in which a block processes several tiles
  bool reversed;       // order of the threads
  double disturbance;  // of E[Delta] at half the limit: makes the polynomial wrong, but not the measured KL
};

// Runs the launches of plugins/key_guard/kernel.cu in the same order.
void run_guard(GuardRun const& run, void* workspace);

// The workspace as the launches divide it.
GuardWorkspace workspace_of(GuardRun const& run, void* workspace);

}  // namespace sws
