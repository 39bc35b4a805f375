#include "banded_transport/kernel.h"
#include "banded_transport/scalar.h"
#include "banded_transport/tensor_core.h"
#include "common/device.h"

namespace sws {
namespace {

template <typename Element, int kReach>
__global__ void __launch_bounds__(kTransportThreads, 2)
    transport_tensor_core_kernel(TransportProblem problem, int parts) {
  Block<kTransportThreads> block;
  transport_tensor_core<Element, kReach>(block, problem, parts);
}

template <typename Element>
__global__ void __launch_bounds__(kScalarThreads) transport_scalar_kernel(TransportProblem problem, int parts) {
  Block<kScalarThreads> block;
  transport_scalar<Element>(block, problem, parts);
}

using TransportKernel = void (*)(TransportProblem, int);

struct Launch {
  TransportKernel kernel;
  int threads;
  int shared_bytes;
  int chunk_channels;
};

template <typename Element>
Launch tensor_core_launch(int radius) {
  if (radius <= 4) {
    return {transport_tensor_core_kernel<Element, 4>, kTransportThreads, BandGeometry<4>::kSharedBytes, kChunkChannels};
  }
  return {transport_tensor_core_kernel<Element, 8>, kTransportThreads, BandGeometry<8>::kSharedBytes, kChunkChannels};
}

template <typename Element>
Launch scalar_launch(int radius) {
  return {transport_scalar_kernel<Element>, kScalarThreads, scalar_transport_bytes(radius), kScalarChannels};
}

Launch choose_launch(TransportProblem const& problem) {
  const bool whole_vectors = problem.channels % 8 == 0 && is_aligned(problem.inputs[0]) &&
                             is_aligned(problem.inputs[1]) && is_aligned(problem.outputs[0]) &&
                             is_aligned(problem.outputs[1]);
  switch (problem.format) {
    case NumberFormat::kFloat16:
      return whole_vectors ? tensor_core_launch<Float16>(problem.radius) : scalar_launch<Float16>(problem.radius);
    case NumberFormat::kBFloat16:
      return whole_vectors ? tensor_core_launch<BFloat16>(problem.radius) : scalar_launch<BFloat16>(problem.radius);
    case NumberFormat::kFloat32:
      break;
  }
  return scalar_launch<float>(problem.radius);
}

bool is_valid(TransportProblem const& problem) {
  return problem.tensors >= 1 && problem.tensors <= kMaxTransportTensors && problem.radius >= 1 &&
         problem.radius <= kMaxTransportRadius && problem.batch >= 1 && problem.batch <= kMaxGridZ &&
         problem.height >= 1 && problem.width >= 1 && problem.channels >= 1;
}

}  // namespace

cudaError_t launch_banded_transport(TransportProblem const& problem, cudaStream_t stream) {
  if (!is_valid(problem)) return cudaErrorInvalidValue;
  const Launch launch = choose_launch(problem);
  int processors = 0;
  if (cudaError_t error = processor_count(&processors); error != cudaSuccess) return error;
  if (launch.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(launch.kernel));
    if (error != cudaSuccess) return error;
  }
  // Distribute the channels over enough blocks for two on each multiprocessor; every further block would gather the
  // weights of its tile once more.
  const int tiles = tile_rows(problem) * tile_columns(problem);
  const int chunks = channel_chunks(problem, launch.chunk_channels).total;
  const int64_t wanted = 2 * processors / (static_cast<int64_t>(tiles) * problem.batch);
  const int parts = wanted < 1 ? 1 : (wanted > chunks ? chunks : static_cast<int>(wanted));
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts), static_cast<unsigned>(problem.batch));
  launch.kernel<<<grid, static_cast<unsigned>(launch.threads), static_cast<size_t>(launch.shared_bytes), stream>>>(
      problem, parts);
  return cudaGetLastError();
}

}  // namespace sws
