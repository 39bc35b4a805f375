// The three ways to go over the logits: what each keeps for a row, at which alphas, and what it records.
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

// Entropy, and growth and slope at limit / 2 and limit.
struct SurveyPass {
  using Row = SharedPeakRow<2, true>;
  static constexpr int kResults = 8;
  enum Result { kEntropySum, kEntropyLeast, kEntropyGreatest, kGrowth0, kGrowth1, kSlope0, kSlope1, kReliable };

  static SWS_HD Combine how(int result) {
    if (result == kEntropyLeast || result == kReliable) return Combine::kLeast;
    return result == kEntropyGreatest ? Combine::kGreatest : Combine::kSum;
  }

  static SWS_HD void measure(Row const& row, AlphaNodes nodes, float (&result)[kResults]) {
    const float entropy = row_entropy(row);
    result[kEntropySum] = entropy;
    result[kEntropyLeast] = entropy;
    result[kEntropyGreatest] = entropy;
    result[kGrowth0] = row_growth(row, 0, nodes.at(0));
    result[kGrowth1] = row_growth(row, 1, nodes.at(1));
    result[kSlope0] = row_slope(row, 0);
    result[kSlope1] = row_slope(row, 1);
    result[kReliable] = is_reliable(row, nodes) ? 1.0f : 0.0f;
  }
};

// KL at a few neighbouring grid points, by the cheap row sums; the last result says whether they hold.
struct CandidatePass {
  using Row = SharedPeakRow<kCandidateProbes, false>;
  static constexpr int kResults = kCandidateProbes + 1;

  static SWS_HD Combine how(int result) { return result < kCandidateProbes ? Combine::kSum : Combine::kLeast; }

  static SWS_HD void measure(Row const& row, AlphaNodes nodes, float (&result)[kResults]) {
    SWS_UNROLL
    for (int i = 0; i < kCandidateProbes; ++i) {
      const float alpha = nodes.at(i);
      result[i] = alpha * row_slope(row, i) - row_growth(row, i, alpha);
    }
    result[kCandidateProbes] = is_reliable(row, nodes) ? 1.0f : 0.0f;
  }
};

// KL at the grid points of a search round, for any logits.
struct SearchPass {
  using Row = OwnPeakRow<kSearchProbes>;
  static constexpr int kResults = kSearchProbes + 1;

  static SWS_HD Combine how(int result) { return result < kSearchProbes ? Combine::kSum : Combine::kLeast; }

  static SWS_HD void measure(Row const& row, AlphaNodes nodes, float (&result)[kResults]) {
    SWS_UNROLL
    for (int i = 0; i < kSearchProbes; ++i) result[i] = row_kl(row, i, nodes.at(i));
    result[kSearchProbes] = 1.0f;
  }
};

static_assert(SurveyPass::kResults <= kRecordFields && CandidatePass::kResults <= kRecordFields &&
                  SearchPass::kResults <= kRecordFields,
              "a record holds the results of every pass");

}  // namespace sws
