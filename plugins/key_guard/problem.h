// The guard's problem, its workspace, and the order of its launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/number_formats.h"
#include "common/platform.h"
#include "key_guard/search.h"

namespace sws {

// Keys and permuted keys are [batch, tokens, heads * head_size], queries [batch, query_tokens, heads * head_size]: all
// rows of the site, or a subset of them. The scalars are [batch] float32.
struct GuardProblem {
  const void* queries;
  const void* keys;
  const void* permuted_keys;
  const float* query_temperature;
  const float* amplitude;
  const float* budget;
  const float* key_gate;
  const float* value_gain;
  float* key_mix;    // alpha_k, [batch]
  float* value_mix;  // a_v, [batch]
  int batch;
  int query_tokens;
  int tokens;
  int heads;
  int head_size;
  float scale;
  float key_cap;
  int bisection_steps;
  NumberFormat format;
};

// Launch 0 is the survey, launch 1 measures at half its limit, launch 2 around the candidate, the following ones
// search, and the last one only writes the result. Each begins by evaluating the records of the previous one. All but
// the first return immediately for a sample whose answer is known.
constexpr int kSurveyRound = 0;
constexpr int kMiddleRound = 1;
constexpr int kCandidateRound = 2;

SWS_HD int final_round(int bisection_steps) { return kCandidateRound + 1 + search_rounds(bisection_steps); }

// A record holds the measurements of one row tile of one head.
constexpr int kRecordFields = 12;

// Memory shared by the launches. A round writes at most `tiles` records per sample.
struct GuardWorkspace {
  SearchState* states;   // [round][batch]
  double* records[2];    // [batch][tiles][kRecordFields], for even and odd rounds: a round reads the other one
  int tiles;             // capacity in records of a sample
  int candidate_probes;  // number of grid points in the candidate round
};

constexpr int kSmallestRowTile = 32;

// Upper bound of row tiles times heads.
SWS_HD int guard_tiles(int query_tokens, int heads) {
  return heads * ((query_tokens + kSmallestRowTile - 1) / kSmallestRowTile);
}

SWS_HD size_t guard_state_bytes(int batch, int bisection_steps) {
  const size_t bytes =
      static_cast<size_t>(final_round(bisection_steps) + 1) * static_cast<size_t>(batch) * sizeof(SearchState);
  return (bytes + 255) / 256 * 256;
}

SWS_HD size_t guard_record_bytes(int batch, int query_tokens, int heads) {
  const size_t tiles = static_cast<size_t>(guard_tiles(query_tokens, heads));
  return static_cast<size_t>(batch) * tiles * kRecordFields * sizeof(double);
}

SWS_HD size_t guard_workspace_bytes(int batch, int query_tokens, int heads, int bisection_steps) {
  return guard_state_bytes(batch, bisection_steps) + 2 * guard_record_bytes(batch, query_tokens, heads);
}

// The workspace in `memory`, which is aligned to at least 16 bytes.
SWS_HD GuardWorkspace lay_out_workspace(GuardProblem const& problem, void* memory, int candidate_probes) {
  auto* bytes = static_cast<unsigned char*>(memory);
  GuardWorkspace workspace;
  workspace.states = reinterpret_cast<SearchState*>(bytes);
  bytes += guard_state_bytes(problem.batch, problem.bisection_steps);
  workspace.records[0] = reinterpret_cast<double*>(bytes);
  bytes += guard_record_bytes(problem.batch, problem.query_tokens, problem.heads);
  workspace.records[1] = reinterpret_cast<double*>(bytes);
  workspace.tiles = guard_tiles(problem.query_tokens, problem.heads);
  workspace.candidate_probes = candidate_probes;
  return workspace;
}

SWS_HD double* record_of(GuardWorkspace const& workspace, int round, int sample, int tile) {
  const int64_t index = static_cast<int64_t>(sample) * workspace.tiles + tile;
  return (round % 2 == 0 ? workspace.records[0] : workspace.records[1]) + index * kRecordFields;
}

SWS_HD SearchState* state_of(GuardProblem const& problem, GuardWorkspace const& workspace, int round, int sample) {
  return workspace.states + static_cast<int64_t>(round) * problem.batch + sample;
}

SWS_HD SampleLimits limits_of(GuardProblem const& problem, int sample) {
  return SampleLimits{problem.amplitude[sample],  problem.budget[sample], problem.key_gate[sample],
                      problem.value_gain[sample], problem.key_cap,        problem.bisection_steps};
}

// Factor from q . k to the logit in units of log 2.
SWS_HD float logit_scale(GuardProblem const& problem, int sample) {
  return problem.scale * 1.4426950408889634f / problem.query_temperature[sample];
}

// A tensor with one row per token: queries, keys or permuted keys.
struct TokenRows {
  const void* data;
  int tokens;
};

SWS_HD TokenRows query_rows(GuardProblem const& problem) { return TokenRows{problem.queries, problem.query_tokens}; }

SWS_HD TokenRows key_rows(GuardProblem const& problem) { return TokenRows{problem.keys, problem.tokens}; }

SWS_HD TokenRows permuted_key_rows(GuardProblem const& problem) {
  return TokenRows{problem.permuted_keys, problem.tokens};
}

// Index of the first element of a token and head.
SWS_HD int64_t head_start(GuardProblem const& problem, TokenRows rows, int sample, int token, int head) {
  const int64_t row = static_cast<int64_t>(sample) * rows.tokens + token;
  return (row * problem.heads + head) * problem.head_size;
}

}  // namespace sws
