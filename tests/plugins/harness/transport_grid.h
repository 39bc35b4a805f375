// The banded transport on the emulated block.
#pragma once

#include "banded_transport/problem.h"

namespace sws {

struct TransportRun {
  TransportProblem problem;
  bool tensor_cores;
  int parts;      // blocks that share the channels of a tile
  bool reversed;  // order of the threads
};

// Runs every block of the launch in plugins/banded_transport/kernel.cu.
void run_transport(TransportRun const& run);

}  // namespace sws
