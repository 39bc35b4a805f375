// The launch functions of the operators on the emulated block, for tensors in host memory.
//
// With benchmarks/gpu/kernels_api.cu they form a library that the GPU benchmark can use in place of the real kernels.
#include "banded_transport/kernel.h"
#include "common/device.h"
#include "guard_rounds.h"
#include "key_guard/kernel.h"
#include "key_guard/tensor_core.h"
#include "transport_grid.h"

namespace sws {

cudaError_t launch_banded_transport(TransportProblem const& problem, cudaStream_t) {
  if (problem.radius > kMaxTransportRadius) return cudaErrorInvalidValue;
  const bool tensor_cores = problem.format != NumberFormat::kFloat32 && problem.channels % 8 == 0;
  run_transport(TransportRun{problem, tensor_cores, 2, false});
  return cudaSuccess;
}

cudaError_t launch_key_guard(GuardProblem const& problem, void* workspace, cudaStream_t) {
  if (workspace == nullptr || !is_aligned(workspace)) return cudaErrorInvalidValue;
  const bool tensor_cores = problem.format != NumberFormat::kFloat32 && problem.head_size % 8 == 0;
  run_guard(GuardRun{problem, kGuardWarps, tensor_cores ? 2 : 0, 3, false, 0.0}, workspace);
  return cudaSuccess;
}

}  // namespace sws

extern "C" const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "unknown";
}
