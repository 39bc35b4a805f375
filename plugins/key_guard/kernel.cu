#include "common/device.h"
#include "key_guard/kernel.h"
#include "key_guard/launches.h"

namespace sws {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kGuardThreads, 3)
    survey_tensor_core_kernel(GuardProblem problem, GuardWorkspace workspace, int stages) {
  Block<kGuardThreads> block;
  survey_tensor_core<Element>(block, problem, workspace, stages);
}

template <typename Element>
__global__ void __launch_bounds__(kScalarGuardThreads)
    survey_scalar_kernel(GuardProblem problem, GuardWorkspace workspace) {
  Block<kScalarGuardThreads> block;
  survey_scalar<Element>(block, problem, workspace);
}

template <typename Element>
__global__ void __launch_bounds__(kGuardThreads, 2)
    candidate_tensor_core_kernel(GuardProblem problem, GuardWorkspace workspace, RoundTiles tiles, int stages) {
  Block<kGuardThreads> block;
  candidate_tensor_core<Element>(block, problem, workspace, tiles, stages);
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

// What the launches of one problem share.
struct Plan {
  GuardProblem problem;
  GuardWorkspace workspace;
  RoundTiles tiles;
  int stages;  // of the tensor-core kernels; 0: the problem is not for them
  int processors;
  cudaStream_t stream;

  unsigned samples() const { return static_cast<unsigned>(problem.batch); }

  // Rounds that usually return at once get a small grid whose blocks go round the tiles.
  dim3 small_grid(int tiles_of_round) const {
    const int wanted = 2 * processors / problem.batch;
    const int blocks = wanted < 1 ? 1 : (wanted > tiles_of_round ? tiles_of_round : wanted);
    return dim3(static_cast<unsigned>(blocks), 1, samples());
  }

  dim3 full_grid() const { return dim3(static_cast<unsigned>(tiles.survey), 1, samples()); }

  size_t tensor_core_bytes() const { return static_cast<size_t>(tensor_core_guard_bytes(problem.head_size, stages)); }
};

// Two stages where they fit, else one; 0 where not even that fits.
cudaError_t choose_stages(GuardProblem const& problem, int* stages) {
  *stages = 0;
  const bool whole_vectors = problem.head_size % 8 == 0 && is_aligned(problem.queries) && is_aligned(problem.keys) &&
                             is_aligned(problem.moved_keys);
  if (problem.format == NumberFormat::kFloat32 || !whole_vectors) return cudaSuccess;
  int limit = 0;
  if (cudaError_t error = shared_memory_limit(&limit); error != cudaSuccess) return error;
  for (int candidate = 2; candidate >= 1; --candidate) {
    if (tensor_core_guard_bytes(problem.head_size, candidate) <= limit) {
      *stages = candidate;
      return cudaSuccess;
    }
  }
  return cudaSuccess;
}

template <typename Element>
cudaError_t launch_fast_rounds(Plan const& plan) {
  const auto bytes = plan.tensor_core_bytes();
  const auto survey = survey_tensor_core_kernel<Element>;
  const auto candidate = candidate_tensor_core_kernel<Element>;
  for (const void* kernel : {reinterpret_cast<const void*>(survey), reinterpret_cast<const void*>(candidate)}) {
    if (cudaError_t error = allow_shared_memory(kernel, static_cast<int>(bytes)); error != cudaSuccess) return error;
  }
  survey<<<plan.full_grid(), kGuardThreads, bytes, plan.stream>>>(plan.problem, plan.workspace, plan.stages);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  candidate<<<plan.small_grid(plan.tiles.candidate), kGuardThreads, bytes, plan.stream>>>(plan.problem, plan.workspace,
                                                                                          plan.tiles, plan.stages);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_search_round(Plan const& plan, int round) {
  search_scalar_kernel<Element>
      <<<plan.small_grid(plan.tiles.search), kScalarGuardThreads, kScalarGuardBytes, plan.stream>>>(
          plan.problem, plan.workspace, plan.tiles, round);
  return cudaGetLastError();
}

template <typename Element>
cudaError_t launch_survey_and_candidate(Plan const& plan) {
  if constexpr (sizeof(Element) == 2) {
    if (plan.stages > 0) return launch_fast_rounds<Element>(plan);
  }
  survey_scalar_kernel<Element>
      <<<plan.full_grid(), kScalarGuardThreads, kScalarGuardBytes, plan.stream>>>(plan.problem, plan.workspace);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_search_round<Element>(plan, kCandidateRound);
}

template <typename Element>
cudaError_t launch_all(Plan const& plan) {
  if (cudaError_t error = launch_survey_and_candidate<Element>(plan); error != cudaSuccess) return error;
  const int last = final_round(plan.problem.bisection_steps);
  for (int round = kCandidateRound + 1; round < last; ++round) {
    if (cudaError_t error = launch_search_round<Element>(plan, round); error != cudaSuccess) return error;
  }
  finish_kernel<<<dim3(1, 1, plan.samples()), kGuardThreads, kDigestBytes, plan.stream>>>(plan.problem, plan.workspace,
                                                                                          plan.tiles, last);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_key_guard(GuardProblem const& problem, void* workspace, cudaStream_t stream) {
  if (!is_valid(problem) || workspace == nullptr || !is_aligned(workspace)) return cudaErrorInvalidValue;
  Plan plan;
  plan.problem = problem;
  plan.stream = stream;
  if (cudaError_t error = choose_stages(problem, &plan.stages); error != cudaSuccess) return error;
  if (cudaError_t error = processor_count(&plan.processors); error != cudaSuccess) return error;
  plan.workspace = lay_out_workspace(problem, workspace, plan.stages > 0 ? kCandidateProbes : kSearchProbes);
  plan.tiles = round_tiles(problem, plan.stages > 0);
  switch (problem.format) {
    case NumberFormat::kFloat16:
      return launch_all<Float16>(plan);
    case NumberFormat::kBFloat16:
      return launch_all<BFloat16>(plan);
    case NumberFormat::kFloat32:
      break;
  }
  return launch_all<float>(plan);
}

}  // namespace sws
