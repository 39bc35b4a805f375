// Test cases of the key guard.
#include "guard_case.h"

#include <cstdint>
#include <vector>

#include "guard_rounds.h"
#include "number_format_name.h"

namespace sws {
namespace {

void write_states(const Case& test, const GuardRun& run, GuardWorkspace const& workspace) {
  std::vector<int32_t> rows;
  for (int round = kMiddleRound; round <= final_round(run.problem.bisection_steps); ++round) {
    for (int sample = 0; sample < run.problem.batch; ++sample) {
      const SearchState& state = *state_of(run.problem, workspace, round, sample);
      rows.insert(rows.end(), {round, sample, static_cast<int32_t>(state.mode), state.below, state.above});
    }
  }
  test.write("states", rows.data(), rows.size() * sizeof(int32_t));
}

const float* floats(const std::vector<unsigned char>& bytes) { return reinterpret_cast<const float*>(bytes.data()); }

}  // namespace

void run_guard_case(const Case& test) {
  GuardRun run = {};
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
  run.row_warps = test.integer("row_warps");
  run.stages = test.integer("stages");
  run.reversed = test.integer("reversed") != 0;
  run.blocks = test.integer("blocks");
  run.disturbance = static_cast<double>(test.real("disturbance"));

  std::vector<std::vector<unsigned char>> tensors;
  for (const char* name : {"q", "k", "kp", "tau_q", "amplitude", "kappa", "key_gate", "value_gain"}) {
    tensors.push_back(test.read(name));
  }
  problem.queries = tensors[0].data();
  problem.keys = tensors[1].data();
  problem.permuted_keys = tensors[2].data();
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
  run_guard(run, memory.data());
  test.write("alpha_k", key_mix.data(), key_mix.size() * sizeof(float));
  test.write("a_v", value_mix.data(), value_mix.size() * sizeof(float));
  write_states(test, run, workspace_of(run, memory.data()));
}

}  // namespace sws
