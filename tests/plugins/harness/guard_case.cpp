// Runs the key guard's kernel bodies: the same launches in the same order as plugins/key_guard/kernel.cu.
#include "guard_case.h"

#include <cstdint>
#include <stdexcept>

#include "emulated_block.h"
#include "key_guard/launches.h"
#include "number_format_name.h"

namespace sws {
namespace {

struct Run {
  GuardProblem problem;
  GuardWorkspace workspace;
  RoundTiles tiles;
  bool tensor_cores;
  int stages;
  bool reversed;
  int blocks;  // grid size of the rounds whose blocks go round the tiles
};

template <typename Element>
void run_survey(const Run& run) {
  const int batch = run.problem.batch;
  if constexpr (sizeof(Element) == 2) {
    if (run.tensor_cores) {
      const int bytes = tensor_core_guard_bytes(run.problem.head_size, run.stages);
      run_grid<kGuardThreads>(run.tiles.survey, 1, batch, bytes, run.reversed, [&](auto& block) {
        survey_tensor_core<Element>(block, run.problem, run.workspace, run.stages);
      });
      return;
    }
  }
  run_grid<kScalarGuardThreads>(run.tiles.survey, 1, batch, kScalarGuardBytes, run.reversed,
                                [&](auto& block) { survey_scalar<Element>(block, run.problem, run.workspace); });
}

template <typename Element>
void run_search(const Run& run, int round) {
  run_grid<kScalarGuardThreads>(run.blocks, 1, run.problem.batch, kScalarGuardBytes, run.reversed, [&](auto& block) {
    search_scalar<Element>(block, run.problem, run.workspace, run.tiles, round);
  });
}

template <typename Element>
void run_candidate(const Run& run) {
  if constexpr (sizeof(Element) == 2) {
    if (run.tensor_cores) {
      const int bytes = tensor_core_guard_bytes(run.problem.head_size, run.stages);
      run_grid<kGuardThreads>(run.blocks, 1, run.problem.batch, bytes, run.reversed, [&](auto& block) {
        candidate_tensor_core<Element>(block, run.problem, run.workspace, run.tiles, run.stages);
      });
      return;
    }
  }
  run_search<Element>(run, kCandidateRound);
}

// Spoils the polynomial but not the KL measured at its nodes: KL = alpha * slope - growth stays as it is.
void disturb_survey(const Run& run, double disturbance) {
  for (int sample = 0; sample < run.problem.batch; ++sample) {
    const AlphaNodes nodes = survey_nodes(limits_of(run.problem, sample));
    const double change = disturbance * run.problem.heads * run.problem.query_tokens / run.tiles.survey;
    for (int tile = 0; tile < run.tiles.survey; ++tile) {
      double* record = record_of(run.workspace, kSurveyRound, sample, tile);
      record[SurveyPass::kSlope0] += change;
      record[SurveyPass::kGrowth0] += change * static_cast<double>(nodes.at(0));
    }
  }
}

template <typename Element>
void run_all(const Case& test, const Run& run) {
  run_survey<Element>(run);
  if (const float disturbance = test.real("disturbance"); disturbance != 0.0f)
    disturb_survey(run, static_cast<double>(disturbance));
  run_candidate<Element>(run);
  const int last = final_round(run.problem.bisection_steps);
  for (int round = kCandidateRound + 1; round < last; ++round) run_search<Element>(run, round);
  run_grid<kGuardThreads>(1, 1, run.problem.batch, kDigestBytes, run.reversed,
                          [&](auto& block) { guard_finish(block, run.problem, run.workspace, run.tiles, last); });
}

void write_states(const Case& test, const Run& run) {
  std::vector<int32_t> rows;
  for (int round = kCandidateRound; round <= final_round(run.problem.bisection_steps); ++round) {
    for (int sample = 0; sample < run.problem.batch; ++sample) {
      const SearchState& state = *state_of(run.problem, run.workspace, round, sample);
      rows.insert(rows.end(), {round, sample, static_cast<int32_t>(state.mode), state.below, state.above});
    }
  }
  test.write("states", rows.data(), rows.size() * sizeof(int32_t));
}

const float* floats(const std::vector<unsigned char>& bytes) { return reinterpret_cast<const float*>(bytes.data()); }

}  // namespace

void run_guard_case(const Case& test) {
  Run run = {};
  GuardProblem& problem = run.problem;
  problem.batch = test.integer("batch");
  problem.query_tokens = test.integer("query_tokens");
  problem.tokens = test.integer("tokens");
  problem.heads = test.integer("heads");
  problem.head_size = test.integer("head_size");
  problem.scale = test.real("scale");
  problem.key_cap = test.real("key_cap");
  problem.bisection_steps = test.integer("bisection_steps");
  problem.format = format_of_name(test.text("format"));
  run.stages = test.integer("stages");
  run.tensor_cores = run.stages > 0;
  run.reversed = test.integer("reversed") != 0;
  run.blocks = test.integer("blocks");

  std::vector<std::vector<unsigned char>> tensors;
  for (const char* name : {"q", "k", "kp", "tau_q", "amplitude", "kappa", "key_gate", "value_gain"}) {
    tensors.push_back(test.read(name));
  }
  problem.queries = tensors[0].data();
  problem.keys = tensors[1].data();
  problem.moved_keys = tensors[2].data();
  problem.query_temperature = floats(tensors[3]);
  problem.amplitude = floats(tensors[4]);
  problem.budget = floats(tensors[5]);
  problem.key_gate = floats(tensors[6]);
  problem.value_gain = floats(tensors[7]);
  std::vector<float> key_mix(static_cast<size_t>(problem.batch), -1.0f);
  std::vector<float> value_mix(static_cast<size_t>(problem.batch), -1.0f);
  problem.key_mix = key_mix.data();
  problem.value_mix = value_mix.data();

  std::vector<unsigned char> memory(
      guard_workspace_bytes(problem.batch, problem.query_tokens, problem.heads, problem.bisection_steps),
      static_cast<unsigned char>(0xFF));
  run.workspace = lay_out_workspace(problem, memory.data(), run.tensor_cores ? kCandidateProbes : kSearchProbes);
  run.tiles = round_tiles(problem, run.tensor_cores);
  with_element(problem.format, [&](auto element) { run_all<decltype(element)>(test, run); });
  test.write("alpha_k", key_mix.data(), key_mix.size() * sizeof(float));
  test.write("a_v", value_mix.data(), value_mix.size() * sizeof(float));
  write_states(test, run);
}

}  // namespace sws
