// Launches the key guard. Does not use TensorRT: both the plugin and the GPU benchmark call it.
#pragma once

#include <cuda_runtime_api.h>

#include "key_guard/problem.h"

namespace sws {

constexpr int kMaxBisectionSteps = 16;

// Enqueues the guard's launches on `stream`: no allocation, no synchronisation, so it can be captured in a CUDA graph.
// `workspace` has guard_workspace_bytes(...) bytes, is aligned to 16, and need not be initialised. Tensors that are not
// aligned to 16 bytes use the scalar kernels. Returns the first CUDA error, cudaErrorInvalidValue for an
// invalid shape, parameter or workspace.
cudaError_t launch_key_guard(GuardProblem const& problem, void* workspace, cudaStream_t stream);

}  // namespace sws
