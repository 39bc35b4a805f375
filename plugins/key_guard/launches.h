// The bodies of the guard's kernels: one for each kind of round, on tensor cores or in scalar arithmetic.
#pragma once

#include "key_guard/scalar.h"
#include "key_guard/tensor_core.h"

namespace sws {

SWS_HD AlphaNodes survey_nodes(SampleLimits limits) { return AlphaNodes{survey_limit(limits), 0.0f}; }

SWS_HD AlphaNodes middle_nodes(SampleLimits limits) { return AlphaNodes{0.5f * survey_limit(limits), 0.0f}; }

SWS_HD int guard_row_tiles(GuardProblem const& problem, int rows) {
  return problem.heads * ((problem.query_tokens + rows - 1) / rows);
}

// Row tiles of each round; without stages, survey, middle and candidate round are scalar.
SWS_HD RoundTiles round_tiles(GuardProblem const& problem, GuardTiling tiling) {
  const int scalar = guard_row_tiles(problem, kScalarRows);
  return RoundTiles{tiling.stages > 0 ? guard_row_tiles(problem, tiling.rows()) : scalar, scalar};
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void survey_tensor_core(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                        GuardTiling tiling) {
  const SampleLimits limits = limits_of(problem, block.z());
  if (!(limits.amplitude > 0.0f)) return;
  measure_tensor_core<Element, SurveyPass>(block, problem, workspace, tiling, kSurveyRound, survey_nodes(limits));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void survey_scalar(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace) {
  const SampleLimits limits = limits_of(problem, block.z());
  if (!(limits.amplitude > 0.0f)) return;
  measure_scalar<Element, SurveyPass>(block, problem, workspace, kSurveyRound, survey_nodes(limits));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void middle_tensor_core(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                        RoundTiles tiles, GuardTiling tiling) {
  const SearchState state = begin_round(block, problem, workspace, tiles, kMiddleRound, block.z());
  if (!measures(state, kMiddleRound, workspace.candidate_probes)) return;
  measure_tensor_core<Element, MiddlePass>(block, problem, workspace, tiling, kMiddleRound,
                                           middle_nodes(limits_of(problem, block.z())));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void middle_scalar(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                   RoundTiles tiles) {
  const SearchState state = begin_round(block, problem, workspace, tiles, kMiddleRound, block.z());
  if (!measures(state, kMiddleRound, workspace.candidate_probes)) return;
  measure_scalar<Element, MiddlePass>(block, problem, workspace, kMiddleRound,
                                      middle_nodes(limits_of(problem, block.z())));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void candidate_tensor_core(BlockType& block, GuardProblem const& problem,
                                           GuardWorkspace const& workspace, RoundTiles tiles, GuardTiling tiling) {
  const SearchState state = begin_round(block, problem, workspace, tiles, kCandidateRound, block.z());
  if (!measures(state, kCandidateRound, workspace.candidate_probes)) return;
  measure_tensor_core<Element, CandidatePass>(block, problem, workspace, tiling, kCandidateRound,
                                              probe_nodes(state, problem.bisection_steps));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void search_scalar(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                   RoundTiles tiles, int round) {
  const SearchState state = begin_round(block, problem, workspace, tiles, round, block.z());
  if (!measures(state, round, workspace.candidate_probes)) return;
  measure_scalar<Element, SearchPass>(block, problem, workspace, round, probe_nodes(state, problem.bisection_steps));
}

}  // namespace sws
