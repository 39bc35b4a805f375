// The number of shared-memory stages of the tensor-core kernels.
#pragma once

#include "common/device.h"
#include "key_guard/tensor_core.h"

namespace sws {

// Two stages overlap the copy of the next keys with the products of the present ones. They are chosen unless they leave
// room for fewer blocks on a multiprocessor than one stage does: resident blocks hide the latency of copies as well,
// and that of everything else. 0: not even one stage fits. Requires allow_shared_memory(kernel).
inline cudaError_t choose_stages(const void* kernel, int head_size, int* stages) {
  int blocks[2] = {0, 0};  // with one and two stages
  for (int i = 0; i < 2; ++i) {
    const int bytes = tensor_core_guard_bytes(head_size, i + 1);
    if (cudaError_t error = resident_blocks(&blocks[i], kernel, kGuardThreads, bytes); error != cudaSuccess) {
      return error;
    }
  }
  *stages = blocks[0] == 0 ? 0 : (blocks[1] < blocks[0] ? 1 : 2);
  return cudaSuccess;
}

}  // namespace sws
