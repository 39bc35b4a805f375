// The guard's decisions, one sample at a time: from averaged measurements to the largest key mixing the budget allows.
//
// Grid point n stands for alpha = cap * n / 2^steps, the values that `steps` halvings of [0, cap] can return. KL(alpha)
// rises with alpha (it is an exponential family's), so the answer is the last grid point whose KL is within the budget.
// A bracket [below, above) holds it: KL(below) is within the budget, KL(above) is not or above is past the last point.
// The bracket moves only by KL values measured at that very alpha over all rows and keys, or by the rise of KL between
// two measured alphas. The polynomial of the survey merely proposes which grid points to measure first.
#pragma once

#include <cmath>

#include "common/platform.h"

namespace sws {

enum class SearchMode : int {
  kCandidate,  // measure `probes` neighbouring grid points around the polynomial's proposal
  kSearch,     // measure grid points spread over the bracket
  kDone,
};

struct SearchState {
  SearchMode mode;
  int below;
  int above;
  int first;   // first grid point to measure
  int stride;  // distance to the next one
  float cap;   // largest alpha, key_cap * a
  float value_mix;
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

// What a sample brings along.
struct SampleLimits {
  float amplitude;  // intensity * w(u), within [0, 1]
  float budget;     // kappa
  float key_gate;
  float value_gain;
  float key_cap;
  int bisection_steps;
};

// Largest alpha possible before the entropy is known.
SWS_HD float survey_limit(SampleLimits limits) { return limits.key_cap * clamp01(limits.amplitude); }

// Means over all rows and heads of a sample; growth(alpha) = log E_0[exp(alpha Delta)] - alpha E_0[Delta], slope is its
// derivative, both measured at half the survey limit and at the limit.
struct SurveyTotals {
  double entropy_mean;
  double entropy_min;
  double entropy_max;
  double growth[2];
  double slope[2];
  bool reliable;
};

SWS_HD double survey_kl(SurveyTotals const& totals, int node, double alpha) {
  return alpha * totals.slope[node] - totals.growth[node];
}

// Coefficients of t^2 .. t^5, t = alpha / limit: the polynomial that has growth's values and slopes at t = 0, 1/2, 1.
struct GrowthPolynomial {
  double c2, c3, c4, c5;
};

SWS_HD GrowthPolynomial fit_growth(SurveyTotals const& totals, double limit) {
  const double v1 = totals.growth[0];
  const double v2 = totals.growth[1];
  const double d1 = totals.slope[0] * limit;
  const double d2 = totals.slope[1] * limit;
  return GrowthPolynomial{-8 * d1 - d2 + 16 * v1 + 7 * v2, 32 * d1 + 5 * d2 - 32 * v1 - 34 * v2,
                          -40 * d1 - 8 * d2 + 16 * v1 + 52 * v2, 16 * d1 + 4 * d2 - 24 * v2};
}

// KL = alpha K' - K, so every power t^e of growth counts (e - 1) times.
SWS_HD double polynomial_kl(GrowthPolynomial p, double t) {
  return t * t * (p.c2 + t * (2 * p.c3 + t * (3 * p.c4 + t * 4 * p.c5)));
}

// Last grid point of the bracket that the polynomial holds to be within the budget.
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

// Narrows the bracket by the survey's two measured KL values: they bound every grid point on their side.
SWS_HD void use_survey_nodes(SearchState& state, SurveyTotals const& totals, double limit, double budget) {
  const double points_per_alpha = state.above / static_cast<double>(state.cap);
  const double middle = 0.5 * limit * points_per_alpha;
  if (survey_kl(totals, 1, limit) <= budget) {
    state.below = state.above - 1;
  } else if (survey_kl(totals, 0, 0.5 * limit) <= budget) {
    const int reached = static_cast<int>(floor(fmin(middle, state.above - 1.0)));
    state.below = reached;
  } else if (middle < state.above) {
    const int failed = static_cast<int>(ceil(middle));
    state.above = failed < 1 ? 1 : failed;
  }
}

// Two limits of trust: a node's sums may have underflowed (`reliable`), and past 1/2 the survey's chained powers could
// lose weights that matter. In both cases the search starts from the whole bracket.
constexpr float kLargestSurveyAlpha = 0.5f;

SWS_HD SearchState decide_after_survey(SurveyTotals const& totals, SampleLimits limits, int candidate_probes) {
  const double spread = fmax(totals.entropy_max - totals.entropy_min, 1e-6);
  const float hu = clamp01(static_cast<float>((totals.entropy_mean - totals.entropy_min) / spread));
  const float a = clamp01(limits.amplitude * hu);
  SearchState state;
  state.cap = limits.key_cap * a;
  state.value_mix = clamp01(limits.value_gain * a);
  state.below = 0;
  state.above = 1 << limits.bisection_steps;
  finish_or_spread(state);
  const float limit = survey_limit(limits);
  if (!(state.cap > 0.0f) || limits.key_gate == 0.0f) {
    state.mode = SearchMode::kDone;
    return state;
  }
  if (!totals.reliable || limit > kLargestSurveyAlpha) return state;

  use_survey_nodes(state, totals, limit, limits.budget);
  finish_or_spread(state);
  if (state.mode == SearchMode::kDone) return state;
  const double t_of_point = static_cast<double>(state.cap) / limit / (1 << limits.bisection_steps);
  const int candidate = propose(fit_growth(totals, limit), state, t_of_point, limits.budget);
  const int latest = state.above - candidate_probes;
  int first = candidate - candidate_probes / 2 + 1;
  if (first > latest) first = latest;
  if (first <= state.below) first = state.below + 1;
  state.first = first;
  state.stride = 1;
  state.mode = SearchMode::kCandidate;
  return state;
}

// Takes in the KL values measured at first, first + stride, ... and chooses what to measure next.
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

// The bisection's own sequence of float operations, so that the result has its very bits.
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
