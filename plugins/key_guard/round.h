// The start of a launch: every block of a sample evaluates the previous round, with the same result, and block 0 stores
// the decision.
#pragma once

#include "key_guard/reduction.h"

namespace sws {

// Shared memory a round needs before it starts measuring.
constexpr int kTotalBytes = kRecordFields * static_cast<int>(sizeof(double));
constexpr int kDigestBytes = kPartBytes + kTotalBytes + 64;
static_assert(sizeof(SearchState) <= 64 && (kPartBytes + kTotalBytes) % 16 == 0, "the decision fits behind the totals");

// Row tiles (times heads) that a round's kernel recorded.
struct RoundTiles {
  int fast;  // survey, middle and candidate round
  int search;

  SWS_HD int of(int round) const { return round <= kCandidateRound ? fast : search; }
};

SWS_HD bool measures(SearchState const& state, int round, int candidate_probes) {
  if (state.mode == SearchMode::kDone) return false;
  if (round == kMiddleRound) return state.mode == SearchMode::kMiddle;
  // The tensor-core candidate round is not accurate for unreliable rows: it leaves them to the search rounds.
  return round != kCandidateRound || state.mode == SearchMode::kCandidate || candidate_probes == kSearchProbes;
}

template <typename Totals>
SWS_HD SurveyTotals survey_totals(Totals const& total, double rows) {
  SurveyTotals totals;
  totals.entropy_mean = total(SurveyPass::kEntropySum) / rows;
  totals.entropy_min = total(SurveyPass::kEntropyLeast);
  totals.entropy_max = total(SurveyPass::kEntropyGreatest);
  totals.kl = total(SurveyPass::kKl) / rows;
  totals.mean_delta = total(SurveyPass::kMeanDelta) / rows;
  totals.reliable = total(SurveyPass::kReliable) >= 1.0;
  return totals;
}

template <typename Totals>
SWS_HD MiddleTotals middle_totals(Totals const& total, double rows) {
  return MiddleTotals{total(MiddlePass::kKl) / rows, total(MiddlePass::kMeanDelta) / rows,
                      total(MiddlePass::kZeroMeanDelta) / rows, total(MiddlePass::kReliable) >= 1.0};
}

// The state after a probing round; `total(i)` is the sum of KL at probe i over all rows, total(kProbes) reliability.
template <int kProbes, typename Totals>
SWS_HD SearchState advanced(SearchState state, Totals const& total, double rows, double budget) {
  double kl[kProbes];
  SWS_UNROLL
  for (int i = 0; i < kProbes; ++i) kl[i] = total(i) / rows;
  advance(state, kl, kProbes, total(kProbes) >= 1.0, budget);
  return state;
}

// Without amplitude there is no mixing, and nothing to measure.
SWS_HD SearchState idle_state() { return SearchState{SearchMode::kDone, 0, 1, 0, 0, 0.0f, 0.0f, 0.0, 0.0}; }

// One thread computes the state, all threads receive it.
template <typename BlockType, typename Compute>
SWS_KERNEL_BODY SearchState decide_once(BlockType& block, Shared<SearchState> shared, Compute compute) {
  block.each_thread([&](int thread) {
    if (thread == 0) shared.store(0, compute(thread), thread);
  });
  block.sync();
  PerThread<SearchState, BlockType::kThreads> states;
  block.each_thread([&](int thread) { states[thread] = shared.load(0, thread); });
  return states[0];
}

// The decision at the start of `round` (>= 1). Uses the first kDigestBytes bytes of shared memory.
template <typename BlockType>
SWS_KERNEL_BODY SearchState digest(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                   RoundTiles tiles, int round, int sample) {
  const SampleLimits limits = limits_of(problem, sample);
  if (!(limits.amplitude > 0.0f)) return idle_state();
  const int previous = round - 1;
  const double rows = static_cast<double>(problem.heads) * problem.query_tokens;
  Shared<double> parts = block.template shared<double>(0, kRecordFields * kReductionParts);
  Shared<double> totals = block.template shared<double>(kPartBytes, kRecordFields);
  Shared<SearchState> decision = block.template shared<SearchState>(kPartBytes + kTotalBytes, 1);

  if (previous == kSurveyRound) {
    total_records<SurveyPass>(block, workspace, previous, sample, tiles.of(previous), parts, totals);
    return decide_once(block, decision, [&](int thread) {
      auto total = [&](int result) { return totals.load(result, thread); };
      return decide_after_survey(survey_totals(total, rows), limits);
    });
  }
  const SearchState before = *state_of(problem, workspace, previous, sample);
  if (!measures(before, previous, workspace.candidate_probes)) return before;
  if (previous == kMiddleRound) {
    total_records<MiddlePass>(block, workspace, previous, sample, tiles.of(previous), parts, totals);
    return decide_once(block, decision, [&](int thread) {
      auto total = [&](int result) { return totals.load(result, thread); };
      return decide_after_middle(before, middle_totals(total, rows), limits, workspace.candidate_probes);
    });
  }
  if (previous == kCandidateRound && workspace.candidate_probes == kCandidateProbes) {
    total_records<CandidatePass>(block, workspace, previous, sample, tiles.of(previous), parts, totals);
    return decide_once(block, decision, [&](int thread) {
      auto total = [&](int result) { return totals.load(result, thread); };
      return advanced<kCandidateProbes>(before, total, rows, limits.budget);
    });
  }
  total_records<SearchPass>(block, workspace, previous, sample, tiles.of(previous), parts, totals);
  return decide_once(block, decision, [&](int thread) {
    auto total = [&](int result) { return totals.load(result, thread); };
    return advanced<kSearchProbes>(before, total, rows, limits.budget);
  });
}

// Stores the decision for the next round and the current outputs. The outputs of a finished sample do not change again.
template <typename BlockType>
SWS_KERNEL_BODY void publish(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace, int round,
                             int sample, SearchState const& state) {
  block.each_thread([&](int thread) {
    if (thread != 0 || block.x() != 0) return;
    *state_of(problem, workspace, round, sample) = state;
    const float alpha = bisected_alpha(state.cap, problem.bisection_steps, state.below);
    problem.key_mix[sample] = problem.key_gate[sample] * alpha;
    problem.value_mix[sample] = state.value_mix;
  });
}

// Evaluates the previous round and stores the decision; for every round except the survey.
template <typename BlockType>
SWS_KERNEL_BODY SearchState begin_round(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                        RoundTiles tiles, int round, int sample) {
  const SearchState state = digest(block, problem, workspace, tiles, round, sample);
  publish(block, problem, workspace, round, sample, state);
  block.sync();
  return state;
}

// Grid: z = sample. The last launch, which measures nothing.
template <typename BlockType>
SWS_KERNEL_BODY void guard_finish(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                  RoundTiles tiles, int round) {
  begin_round(block, problem, workspace, tiles, round, block.z());
}

}  // namespace sws
