// The guard's decisions, one sample at a time: from averaged measurements to the largest key mixing within the budget.
//
// Grid point n is alpha = cap * n / 2^steps, the values that `steps` halvings of [0, cap] can return. KL(alpha)
// increases with alpha (the rows are an exponential family), so the answer is the last grid point whose KL is within
// the budget. It is in a bracket [below, above): KL(below) is within the budget, and KL(above) is not or above is past
// the last point. The bracket changes only by KL values measured at that alpha over all rows and keys, or by measured
// values at two alphas between which KL increases. The polynomial only proposes which grid points to measure first.
#pragma once

#include <cmath>

#include "common/platform.h"

namespace sws {

// What the next round measures.
enum class SearchMode : int {
  kMiddle,     // half the survey's limit
  kCandidate,  // consecutive grid points around the one that the polynomial proposes
  kSearch,     // grid points spread over the bracket
  kDone,       // nothing
};

struct SearchState {
  SearchMode mode;
  int below;
  int above;
  int first;   // first grid point to measure
  int stride;  // distance to the next one
  float cap;   // largest alpha, key_cap * a
  float value_mix;
  double limit_kl;          // measured by the survey at its limit: mean KL, in nats
  double limit_mean_delta;  // and mean E[Delta], in nats
};

// Grid points measured in one search round, and around a candidate by the tensor-core kernel.
constexpr int kSearchProbes = 11;
constexpr int kCandidateProbes = 5;

// Each search round divides the bracket by kSearchProbes + 1.
SWS_HD int divided_gap(int gap) { return (gap + kSearchProbes) / (kSearchProbes + 1); }

SWS_HD int search_rounds(int bisection_steps) {
  int rounds = 0;
  for (int gap = 1 << bisection_steps; gap > 1; gap = divided_gap(gap)) ++rounds;
  return rounds;
}

SWS_HD float clamp01(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }

// The inputs of one sample.
struct SampleLimits {
  float amplitude;  // intensity * w(u), within [0, 1]
  float budget;     // kappa
  float key_gate;
  float value_gain;
  float key_cap;
  int bisection_steps;
};

// Upper bound of alpha before the entropy is known.
SWS_HD float survey_limit(SampleLimits limits) { return limits.key_cap * clamp01(limits.amplitude); }

// Means over all rows and heads of a sample, measured at the survey's limit.
struct SurveyTotals {
  double entropy_mean;
  double entropy_min;
  double entropy_max;
  double kl;
  double mean_delta;  // E[Delta]
  bool reliable;
};

// Means measured at half the survey's limit.
struct MiddleTotals {
  double kl;
  double mean_delta;
  double zero_mean_delta;  // E[Delta] at alpha = 0
  bool reliable;
};

// Coefficients of t^2 .. t^5, t = alpha / limit, of the polynomial for growth(alpha) = log E_0[exp(alpha Delta)] -
// alpha E_0[Delta] that has its values and slopes at t = 0, 1/2 and 1.
struct GrowthPolynomial {
  double c2, c3, c4, c5;
};

// The slope of growth is E_alpha[Delta] - E_0[Delta], and KL = alpha slope - growth gives its value.
SWS_HD GrowthPolynomial fit_growth(SearchState const& state, MiddleTotals const& middle, double limit) {
  const double d1 = (middle.mean_delta - middle.zero_mean_delta) * limit;
  const double d2 = (state.limit_mean_delta - middle.zero_mean_delta) * limit;
  const double v1 = 0.5 * d1 - middle.kl;
  const double v2 = d2 - state.limit_kl;
  return GrowthPolynomial{-8 * d1 - d2 + 16 * v1 + 7 * v2, 32 * d1 + 5 * d2 - 32 * v1 - 34 * v2,
                          -40 * d1 - 8 * d2 + 16 * v1 + 52 * v2, 16 * d1 + 4 * d2 - 24 * v2};
}

// KL = alpha K' - K, so the power t^e of growth is multiplied by (e - 1).
SWS_HD double polynomial_kl(GrowthPolynomial p, double t) {
  return t * t * (p.c2 + t * (2 * p.c3 + t * (3 * p.c4 + t * 4 * p.c5)));
}

// Last grid point of the bracket that is within the budget according to the polynomial.
SWS_HD int propose(GrowthPolynomial polynomial, SearchState const& state, double t_of_point, double budget) {
  int below = state.below;
  int above = state.above;
  while (above - below > 1) {
    const int middle = (below + above) / 2;
    if (polynomial_kl(polynomial, t_of_point * middle) <= budget) {
      below = middle;
    } else {
      above = middle;
    }
  }
  return below;
}

SWS_HD void finish_or_spread(SearchState& state) {
  state.stride = divided_gap(state.above - state.below);
  state.first = state.below + state.stride;
  state.mode = state.above - state.below == 1 ? SearchMode::kDone : SearchMode::kSearch;
}

// Past this alpha the chained weights of the candidate pass could lose weights that matter: the search starts from the
// whole bracket instead.
constexpr float kLargestChainedAlpha = 0.5f;

SWS_HD SearchState decide_after_survey(SurveyTotals const& totals, SampleLimits limits) {
  const double spread = fmax(totals.entropy_max - totals.entropy_min, 1e-6);
  const float hu = clamp01(static_cast<float>((totals.entropy_mean - totals.entropy_min) / spread));
  const float a = clamp01(limits.amplitude * hu);
  SearchState state;
  state.cap = limits.key_cap * a;
  state.value_mix = clamp01(limits.value_gain * a);
  state.below = 0;
  state.above = 1 << limits.bisection_steps;
  state.limit_kl = totals.kl;
  state.limit_mean_delta = totals.mean_delta;
  finish_or_spread(state);
  if (!(state.cap > 0.0f) || limits.key_gate == 0.0f) {
    state.mode = SearchMode::kDone;
    return state;
  }
  if (!totals.reliable) return state;
  if (totals.kl <= limits.budget) {
    // The limit is not below the cap, so every grid point is within the budget.
    state.below = state.above - 1;
    state.mode = SearchMode::kDone;
  } else if (survey_limit(limits) <= kLargestChainedAlpha) {
    state.mode = SearchMode::kMiddle;
  }
  return state;
}

// Narrows the bracket by KL at half the limit, which bounds every grid point on its side, and chooses the candidates.
SWS_HD SearchState decide_after_middle(SearchState state, MiddleTotals const& totals, SampleLimits limits,
                                       int candidate_probes) {
  finish_or_spread(state);
  if (!totals.reliable) return state;
  const double limit = survey_limit(limits);
  const double middle = 0.5 * limit * state.above / static_cast<double>(state.cap);
  if (totals.kl <= limits.budget) {
    state.below = static_cast<int>(floor(fmin(middle, state.above - 1.0)));
  } else if (middle < state.above) {
    const int failed = static_cast<int>(ceil(middle));
    state.above = failed < 1 ? 1 : failed;
  }
  finish_or_spread(state);
  if (state.mode == SearchMode::kDone) return state;
  const double t_of_point = static_cast<double>(state.cap) / limit / (1 << limits.bisection_steps);
  const int candidate = propose(fit_growth(state, totals, limit), state, t_of_point, limits.budget);
  const int latest = state.above - candidate_probes;
  int first = candidate - candidate_probes / 2 + 1;
  if (first > latest) first = latest;
  if (first <= state.below) first = state.below + 1;
  state.first = first;
  state.stride = 1;
  state.mode = SearchMode::kCandidate;
  return state;
}

// Narrows the bracket by the KL values measured at first, first + stride, ... and chooses what to measure next.
SWS_HD void advance(SearchState& state, const double* kl, int probes, bool reliable, double budget) {
  for (int i = 0; reliable && i < probes; ++i) {
    const int point = state.first + i * state.stride;
    if (point >= state.above) break;
    if (kl[i] <= budget) {
      state.below = point;
    } else {
      state.above = point;
    }
  }
  finish_or_spread(state);
}

// The bisection's sequence of float operations, so that the result has the same bits.
SWS_HD float bisected_alpha(float cap, int steps, int point) {
  float low = 0.0f;
  float high = cap;
  for (int bit = steps - 1, reached = 0; bit >= 0; --bit) {
    const float middle = 0.5f * (low + high);
    if (reached + (1 << bit) <= point) {
      reached += 1 << bit;
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace sws
