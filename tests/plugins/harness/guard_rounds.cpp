#include "guard_rounds.h"

#include "emulated_block.h"
#include "key_guard/launches.h"
#include "number_format_name.h"

namespace sws {
namespace {

struct Launches : GuardRun {
  GuardWorkspace workspace;
  RoundTiles tiles;
  GuardTiling tiling;

  bool tensor_cores() const { return stages > 0; }
};

template <typename Element>
void run_survey(const Launches& run) {
  const int batch = run.problem.batch;
  if constexpr (sizeof(Element) == 2) {
    if (run.tensor_cores()) {
      const int bytes = tensor_core_guard_bytes(run.problem.head_size, run.tiling);
      run_grid<kGuardThreads>(run.tiles.fast, 1, batch, bytes, run.reversed, [&](auto& block) {
        survey_tensor_core<Element>(block, run.problem, run.workspace, run.tiling);
      });
      return;
    }
  }
  run_grid<kScalarGuardThreads>(run.tiles.fast, 1, batch, kScalarGuardBytes, run.reversed,
                                [&](auto& block) { survey_scalar<Element>(block, run.problem, run.workspace); });
}

template <typename Element>
void run_middle(const Launches& run) {
  const int batch = run.problem.batch;
  if constexpr (sizeof(Element) == 2) {
    if (run.tensor_cores()) {
      const int bytes = tensor_core_guard_bytes(run.problem.head_size, run.tiling);
      run_grid<kGuardThreads>(run.blocks, 1, batch, bytes, run.reversed, [&](auto& block) {
        middle_tensor_core<Element>(block, run.problem, run.workspace, run.tiles, run.tiling);
      });
      return;
    }
  }
  run_grid<kScalarGuardThreads>(run.blocks, 1, batch, kScalarGuardBytes, run.reversed, [&](auto& block) {
    middle_scalar<Element>(block, run.problem, run.workspace, run.tiles);
  });
}

template <typename Element>
void run_search(const Launches& run, int round) {
  run_grid<kScalarGuardThreads>(run.blocks, 1, run.problem.batch, kScalarGuardBytes, run.reversed, [&](auto& block) {
    search_scalar<Element>(block, run.problem, run.workspace, run.tiles, round);
  });
}

template <typename Element>
void run_candidate(const Launches& run) {
  if constexpr (sizeof(Element) == 2) {
    if (run.tensor_cores()) {
      const int bytes = tensor_core_guard_bytes(run.problem.head_size, run.tiling);
      run_grid<kGuardThreads>(run.blocks, 1, run.problem.batch, bytes, run.reversed, [&](auto& block) {
        candidate_tensor_core<Element>(block, run.problem, run.workspace, run.tiles, run.tiling);
      });
      return;
    }
  }
  run_search<Element>(run, kCandidateRound);
}

void disturb_middle(const Launches& run) {
  const double change = run.disturbance * run.problem.heads * run.problem.query_tokens / run.tiles.fast;
  for (int sample = 0; sample < run.problem.batch; ++sample) {
    for (int tile = 0; tile < run.tiles.fast; ++tile) {
      record_of(run.workspace, kMiddleRound, sample, tile)[MiddlePass::kMeanDelta] += change;
    }
  }
}

template <typename Element>
void run_all(const Launches& run) {
  run_survey<Element>(run);
  run_middle<Element>(run);
  if (run.disturbance != 0.0) disturb_middle(run);
  run_candidate<Element>(run);
  const int last = final_round(run.problem.bisection_steps);
  for (int round = kCandidateRound + 1; round < last; ++round) run_search<Element>(run, round);
  run_grid<kGuardThreads>(1, 1, run.problem.batch, kDigestBytes, run.reversed,
                          [&](auto& block) { guard_finish(block, run.problem, run.workspace, run.tiles, last); });
}

}  // namespace

GuardWorkspace workspace_of(GuardRun const& run, void* workspace) {
  return lay_out_workspace(run.problem, workspace, run.stages > 0 ? kCandidateProbes : kSearchProbes);
}

void run_guard(GuardRun const& run, void* workspace) {
  const GuardTiling tiling{run.row_warps, run.stages};
  const Launches launches{run, workspace_of(run, workspace), round_tiles(run.problem, tiling), tiling};
  with_element(run.problem.format, [&](auto element) { run_all<decltype(element)>(launches); });
}

}  // namespace sws
