// Launches the banded transport. Does not use TensorRT: both the plugin and the GPU benchmark call it.
#pragma once

#include <cuda_runtime_api.h>

#include "banded_transport/problem.h"

namespace sws {

// Enqueues the transport on `stream`: no allocation, no synchronisation, so it can be captured in a CUDA graph.
// Tensors that are not aligned to 16 bytes use the scalar kernel. Returns the first CUDA error,
// cudaErrorInvalidValue for a shape out of range.
cudaError_t launch_banded_transport(TransportProblem const& problem, cudaStream_t stream);

}  // namespace sws
