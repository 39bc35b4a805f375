#include "common/device.h"
#include "key_guard/kernel.h"
#include "key_guard/launches.h"
#include "key_guard/tiling.h"

namespace sws {
namespace {

// Blocks on a multiprocessor for which the compiler limits the registers of survey and middle kernel: to 128 for each
// thread with four blocks, 168 with three. With one block more they spill.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr int kSurveyBlocks = 4;
#elif __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kSurveyBlocks = 2;
#else
constexpr int kSurveyBlocks = 3;
#endif
constexpr int kCandidateBlocks = 2;
constexpr int kScalarBlocks = 2;

template <typename Element>
__global__ void __launch_bounds__(kGuardThreads, kSurveyBlocks)
    survey_tensor_core_kernel(GuardProblem problem, GuardWorkspace workspace, GuardTiling tiling) {
  Block<kGuardThreads> block;
  survey_tensor_core<Element>(block, problem, workspace, tiling);
}

template <typename Element>
__global__ void __launch_bounds__(kScalarGuardThreads, kScalarBlocks)
    survey_scalar_kernel(GuardProblem problem, GuardWorkspace workspace) {
  Block<kScalarGuardThreads> block;
  survey_scalar<Element>(block, problem, workspace);
}

template <typename Element>
__global__ void __launch_bounds__(kGuardThreads, kSurveyBlocks)
    middle_tensor_core_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles, GuardTiling tiling) {
  Block<kGuardThreads> block;
  middle_tensor_core<Element>(block, problem, workspace, tiles, tiling);
}

template <typename Element>
__global__ void __launch_bounds__(kScalarGuardThreads, kScalarBlocks)
    middle_scalar_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles) {
  Block<kScalarGuardThreads> block;
  middle_scalar<Element>(block, problem, workspace, tiles);
}

template <typename Element>
__global__ void __launch_bounds__(kGuardThreads, kCandidateBlocks)
    candidate_tensor_core_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles, GuardTiling tiling) {
  Block<kGuardThreads> block;
  candidate_tensor_core<Element>(block, problem, workspace, tiles, tiling);
}

template <typename Element>
__global__ void __launch_bounds__(kScalarGuardThreads)
    search_scalar_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles, int round) {
  Block<kScalarGuardThreads> block;
  search_scalar<Element>(block, problem, workspace, tiles, round);
}

__global__ void __launch_bounds__(kGuardThreads)
    finish_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles, int round) {
  Block<kGuardThreads> block;
  guard_finish(block, problem, workspace, tiles, round);
}

bool is_valid(GuardProblem const& problem) {
  return problem.batch >= 1 && problem.batch <= kMaxGridZ && problem.query_tokens >= 1 && problem.tokens >= 1 &&
         problem.heads >= 1 && problem.head_size >= 1 && problem.bisection_steps >= 1 &&
         problem.bisection_steps <= kMaxBisectionSteps && problem.key_cap >= 0.0f && problem.key_cap <= 1.0f &&
         problem.scale > 0.0f;
}

// Launch parameters of one problem.
struct Plan {
  GuardProblem problem;
  GuardWorkspace workspace;
  RoundTiles tiles;
  GuardTiling tiling;  // of the tensor-core kernels; without stages they do not support the problem
  int processors;
  cudaStream_t stream;

  unsigned samples() const { return static_cast<unsigned>(problem.batch); }

  // For rounds that usually return immediately: no more blocks than are resident, each processes several tiles.
  dim3 resident_grid(int tiles_of_round, int blocks_of_processor) const {
    const int wanted = blocks_of_processor * processors / problem.batch;
    const int blocks = wanted < 1 ? 1 : (wanted > tiles_of_round ? tiles_of_round : wanted);
    return dim3(static_cast<unsigned>(blocks), 1, samples());
  }

  dim3 full_grid() const { return dim3(static_cast<unsigned>(tiles.fast), 1, samples()); }
};

template <typename Kernel>
const void* address_of(Kernel* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

// Sets the kernels' shared-memory limits and chooses the tiling.
template <typename Element>
cudaError_t prepare_tensor_cores(Plan* plan) {
  GuardProblem const& problem = plan->problem;
  const bool whole_vectors = problem.head_size % 8 == 0 && is_aligned(problem.queries) && is_aligned(problem.keys) &&
                             is_aligned(problem.permuted_keys);
  if (!whole_vectors) return cudaSuccess;
  const void* survey = address_of(survey_tensor_core_kernel<Element>);
  for (const void* kernel :
       {survey, address_of(middle_tensor_core_kernel<Element>), address_of(candidate_tensor_core_kernel<Element>)}) {
    if (cudaError_t error = allow_shared_memory(kernel); error != cudaSuccess) return error;
  }
  return choose_tiling(survey, problem, plan->processors, &plan->tiling);
}

template <typename Element>
cudaError_t launch_fast_rounds(Plan const& plan) {
  const auto bytes = static_cast<size_t>(tensor_core_guard_bytes(plan.problem.head_size, plan.tiling));
  survey_tensor_core_kernel<Element>
      <<<plan.full_grid(), kGuardThreads, bytes, plan.stream>>>(plan.problem, plan.workspace, plan.tiling);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  middle_tensor_core_kernel<Element>
      <<<plan.resident_grid(plan.tiles.fast, kSurveyBlocks), kGuardThreads, bytes, plan.stream>>>(
          plan.problem, plan.workspace, plan.tiles, plan.tiling);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  candidate_tensor_core_kernel<Element>
      <<<plan.resident_grid(plan.tiles.fast, kCandidateBlocks), kGuardThreads, bytes, plan.stream>>>(
          plan.problem, plan.workspace, plan.tiles, plan.tiling);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_search_round(Plan const& plan, int round) {
  const dim3 grid = plan.resident_grid(plan.tiles.of(round), kScalarBlocks);
  search_scalar_kernel<Element>
      <<<grid, kScalarGuardThreads, kScalarGuardBytes, plan.stream>>>(plan.problem, plan.workspace, plan.tiles, round);
  return cudaGetLastError();
}

// Survey, middle and candidate round in scalar arithmetic.
template <typename Element>
cudaError_t launch_scalar_rounds(Plan const& plan) {
  survey_scalar_kernel<Element>
      <<<plan.full_grid(), kScalarGuardThreads, kScalarGuardBytes, plan.stream>>>(plan.problem, plan.workspace);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  middle_scalar_kernel<Element>
      <<<plan.resident_grid(plan.tiles.fast, kScalarBlocks), kScalarGuardThreads, kScalarGuardBytes, plan.stream>>>(
          plan.problem, plan.workspace, plan.tiles);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_search_round<Element>(plan, kCandidateRound);
}

template <typename Element>
cudaError_t launch_first_rounds(Plan const& plan) {
  if constexpr (sizeof(Element) == 2) {
    if (plan.tiling.stages > 0) return launch_fast_rounds<Element>(plan);
  }
  return launch_scalar_rounds<Element>(plan);
}

template <typename Element>
cudaError_t launch_all(GuardProblem const& problem, void* workspace, cudaStream_t stream) {
  Plan plan = {};
  plan.problem = problem;
  plan.stream = stream;
  if (cudaError_t error = processor_count(&plan.processors); error != cudaSuccess) return error;
  if constexpr (sizeof(Element) == 2) {
    if (cudaError_t error = prepare_tensor_cores<Element>(&plan); error != cudaSuccess) return error;
  }
  plan.workspace = lay_out_workspace(problem, workspace, plan.tiling.stages > 0 ? kCandidateProbes : kSearchProbes);
  plan.tiles = round_tiles(problem, plan.tiling);
  if (cudaError_t error = launch_first_rounds<Element>(plan); error != cudaSuccess) return error;
  const int last = final_round(problem.bisection_steps);
  for (int round = kCandidateRound + 1; round < last; ++round) {
    if (cudaError_t error = launch_search_round<Element>(plan, round); error != cudaSuccess) return error;
  }
  finish_kernel<<<dim3(1, 1, plan.samples()), kGuardThreads, kDigestBytes, stream>>>(plan.problem, plan.workspace,
                                                                                     plan.tiles, last);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_key_guard(GuardProblem const& problem, void* workspace, cudaStream_t stream) {
  if (!is_valid(problem) || workspace == nullptr || !is_aligned(workspace)) return cudaErrorInvalidValue;
  switch (problem.format) {
    case NumberFormat::kFloat16:
      return launch_all<Float16>(problem, workspace, stream);
    case NumberFormat::kBFloat16:
      return launch_all<BFloat16>(problem, workspace, stream);
    case NumberFormat::kFloat32:
      break;
  }
  return launch_all<float>(problem, workspace, stream);
}

}  // namespace sws
