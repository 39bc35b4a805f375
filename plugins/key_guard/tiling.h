// How the blocks of the tensor-core kernels divide a problem on the current device.
#pragma once

#include "common/device.h"
#include "key_guard/tensor_core.h"

namespace sws {

// Chooses the tiling of `kernel` for a problem; no stages if not even one fits. Requires allow_shared_memory(kernel).
//
// Blocks of 64 rows are for problems whose blocks of 128 rows would leave multiprocessors with fewer than two blocks.
// Two stages overlap the copy of the next keys with the products of the present ones. They are chosen unless fewer
// blocks would then be resident than the problem has for each multiprocessor: resident blocks hide the latency of
// copies as well, and that of everything else.
inline cudaError_t choose_tiling(const void* kernel, GuardProblem const& problem, int processors, GuardTiling* tiling) {
  auto blocks_each = [&](int rows) {
    const int row_tiles = (problem.query_tokens + rows - 1) / rows;
    const int64_t tiles = static_cast<int64_t>(row_tiles) * problem.heads * problem.batch;
    return static_cast<int>((tiles + processors - 1) / processors);
  };
  GuardTiling chosen{kGuardWarps, 1};
  if (blocks_each(kMostGuardRows) < 2) chosen.row_warps = kGuardWarps / 2;
  int resident[2] = {0, 0};  // blocks with one and two stages
  for (int i = 0; i < 2; ++i) {
    chosen.stages = i + 1;
    const int bytes = tensor_core_guard_bytes(problem.head_size, chosen);
    if (cudaError_t error = resident_blocks(&resident[i], kernel, kGuardThreads, bytes); error != cudaSuccess) {
      return error;
    }
  }
  const int needed = blocks_each(chosen.rows());
  const int useful = resident[0] < needed ? resident[0] : needed;
  chosen.stages = resident[0] == 0 ? 0 : (resident[1] < useful ? 1 : 2);
  *tiling = chosen;
  return cudaSuccess;
}

}  // namespace sws
