// The four passes over the logits: what each accumulates for a row, at which alphas, and what it records.
#pragma once

#include "key_guard/problem.h"
#include "key_guard/row_statistics.h"

namespace sws {

enum class Combine { kSum, kLeast, kGreatest };

SWS_HD double combine(Combine how, double a, double b) {
  if (how == Combine::kSum) return a + b;
  if (how == Combine::kLeast) return b < a ? b : a;
  return b > a ? b : a;
}

SWS_HD double neutral(Combine how) {
  constexpr double kHuge = 1e300;
  if (how == Combine::kSum) return 0.0;
  return how == Combine::kLeast ? kHuge : -kHuge;
}

SWS_HD AlphaNodes probe_nodes(SearchState const& state, int bisection_steps) {
  const float unit = state.cap / static_cast<float>(1 << bisection_steps);
  return AlphaNodes{unit * static_cast<float>(state.first), unit * static_cast<float>(state.stride)};
}

// Entropy of the rows, and KL at the limit of alpha: all that is needed unless the budget binds.
struct SurveyPass {
  using Row = SharedPeakRow<1, Moment::kLevel>;
  static constexpr int kResults = 6;
  enum Result { kEntropySum, kEntropyLeast, kEntropyGreatest, kKl, kMeanDelta, kReliable };

  static SWS_HD Combine how(int result) {
    if (result == kEntropyLeast || result == kReliable) return Combine::kLeast;
    return result == kEntropyGreatest ? Combine::kGreatest : Combine::kSum;
  }

  static SWS_HD void measure(Row const& row, float scale, AlphaNodes nodes, float (&result)[kResults]) {
    const float entropy = row_entropy(row);
    result[kEntropySum] = entropy;
    result[kEntropyLeast] = entropy;
    result[kEntropyGreatest] = entropy;
    result[kKl] = row_kl(row, 0, nodes.at(0), scale);
    result[kMeanDelta] = row_node_mean_delta(row, 0, scale);
    result[kReliable] = is_reliable(row, scale, nodes) ? 1.0f : 0.0f;
  }
};

// KL at half the limit, and E[Delta] there and at alpha = 0: what a polynomial for KL needs besides the survey.
struct MiddlePass {
  using Row = SharedPeakRow<1, Moment::kDelta>;
  static constexpr int kResults = 4;
  enum Result { kKl, kMeanDelta, kZeroMeanDelta, kReliable };

  static SWS_HD Combine how(int result) { return result == kReliable ? Combine::kLeast : Combine::kSum; }

  static SWS_HD void measure(Row const& row, float scale, AlphaNodes nodes, float (&result)[kResults]) {
    result[kKl] = row_kl(row, 0, nodes.at(0), scale);
    result[kMeanDelta] = row_node_mean_delta(row, 0, scale);
    result[kZeroMeanDelta] = row_mean_delta(row, scale);
    result[kReliable] = is_reliable(row, scale, nodes) ? 1.0f : 0.0f;
  }
};

// KL at consecutive grid points, by the cheap row sums; the last result is their reliability.
struct CandidatePass {
  using Row = SharedPeakRow<kCandidateProbes, Moment::kNone>;
  static constexpr int kResults = kCandidateProbes + 1;

  static SWS_HD Combine how(int result) { return result < kCandidateProbes ? Combine::kSum : Combine::kLeast; }

  static SWS_HD void measure(Row const& row, float scale, AlphaNodes nodes, float (&result)[kResults]) {
    SWS_UNROLL
    for (int i = 0; i < kCandidateProbes; ++i) result[i] = row_kl(row, i, nodes.at(i), scale);
    result[kCandidateProbes] = is_reliable(row, scale, nodes) ? 1.0f : 0.0f;
  }
};

// KL at the grid points of a search round, for any logits.
struct SearchPass {
  using Row = OwnPeakRow<kSearchProbes>;
  static constexpr int kResults = kSearchProbes + 1;

  static SWS_HD Combine how(int result) { return result < kSearchProbes ? Combine::kSum : Combine::kLeast; }

  static SWS_HD void measure(Row const& row, float /*scale*/, AlphaNodes nodes, float (&result)[kResults]) {
    SWS_UNROLL
    for (int i = 0; i < kSearchProbes; ++i) result[i] = row_kl(row, i, nodes.at(i));
    result[kSearchProbes] = 1.0f;
  }
};

static_assert(SurveyPass::kResults <= kRecordFields && MiddlePass::kResults <= kRecordFields &&
                  CandidatePass::kResults <= kRecordFields && SearchPass::kResults <= kRecordFields,
              "a record holds the results of every pass");

}  // namespace sws
