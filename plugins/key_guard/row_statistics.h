// Statistics of one row of logits, accumulated in a single pass over the keys. Logits are in units of log 2.
//
// A row receives pairs (y0, y1), the products of its query with a key under k and under P k. The logits are x0 = scale
// y0 and x1 = scale y1, and x(alpha) = x0 + alpha (x1 - x0). Sums of exp2(x) are relative to running maxima ("peaks")
// and are rescaled when a maximum rises.
#pragma once

#include <cmath>

#include "common/platform.h"

#ifndef __CUDA_ARCH__
#include "common/number_formats.h"
#endif

namespace sws {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The logit of a padded key, and the peak of a row without keys. Both are finite, so no difference of them is NaN, and
// they are far enough apart that a padded key has no weight even in such a row.
constexpr float kPaddedLogit = -1e30f;
constexpr float kNoPeak = -1e28f;

// 2^x with a relative error of 2^-22. The hardware instruction on the device; on a CPU the exact value with an error of
// that size, of either sign.
SWS_HD float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float exact = exp2f(x);
  if (x == floorf(x)) return exact < 0x1p-126f ? 0.0f : exact;
  const float error = (bits_of(x) * 2654435761u) >> 31 != 0 ? 0x1p-22f : -0x1p-22f;
  return exact < 0x1p-126f ? 0.0f : exact * (1.0f + error);
#endif
}

// The alphas at which KL is measured: base, base + stride, ...
struct AlphaNodes {
  float base;
  float stride;

  SWS_HD float at(int node) const { return base + static_cast<float>(node) * stride; }
};

// How far, in units of log 2, x0 may exceed the peak of a SharedPeakRow before its sums are rescaled. Rescaling at each
// new maximum would happen in some thread of a warp in most steps; weights up to 2^4 cost no accuracy.
constexpr float kPeakSlack = 4.0f;

// What a SharedPeakRow sums at alpha = 0 besides the weights e = exp2(x0 - peak).
enum class Moment {
  kNone,
  kLevel,  // e (x0 - peak), for the entropy
  kDelta,  // e (y1 - y0), for E_0[Delta]
};

// Row sums at alpha = 0 and at kNodes other alphas ("nodes"), all relative to one peak: max x0, or up to kPeakSlack
// less. Costs one exponential for alpha = 0, one for the first node and, with several nodes, one for the factor from
// each node to the next. Sums of differences are of products q . k before scaling, y1 - y0. Not accurate if the weights
// at a node leave the range of float, see is_reliable.
template <int kNodeCount, Moment kMomentKind>
struct SharedPeakRow {
  static constexpr int kNodes = kNodeCount;
  static constexpr Moment kMoment = kMomentKind;
  static constexpr int kMomentSums = kMoment == Moment::kNone ? 0 : 1;
  static constexpr int kGreatestDeltas = kNodes == 1 ? 0 : 1;
  static constexpr int kPeak = 0;
  static constexpr int kMass = 1;                             // sum of e
  static constexpr int kMomentSum = 2;                        // if there is one
  static constexpr int kNodeMass = 2 + kMomentSums;           // sum of w = exp2(x0 - peak + alpha (x1 - x0))
  static constexpr int kNodeDelta = kNodeMass + kNodes;       // sum of w (y1 - y0)
  static constexpr int kGreatestDelta = kNodeDelta + kNodes;  // if there are several nodes
  static constexpr int kFields = kGreatestDelta + kGreatestDeltas;

  float field[kFields];
};

template <int kNodes, Moment kMoment>
SWS_HD void clear_row(SharedPeakRow<kNodes, kMoment>& row) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  SWS_UNROLL
  for (int i = 0; i < Row::kFields; ++i) row.field[i] = 0.0f;
  row.field[Row::kPeak] = kNoPeak;
}

// Expresses the sums relative to another peak, which is not lower.
template <int kNodes, Moment kMoment>
SWS_HD void rebase(SharedPeakRow<kNodes, kMoment>& row, float peak) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float fall = row.field[Row::kPeak] - peak;
  const float factor = fast_exp2(fall);
  if constexpr (kMoment == Moment::kLevel) row.field[Row::kMomentSum] += row.field[Row::kMass] * fall;
  SWS_UNROLL
  for (int i = Row::kMass; i < Row::kNodeDelta + kNodes; ++i) row.field[i] *= factor;
  row.field[Row::kPeak] = peak;
}

// Adds keys whose logits are scale * y0 and scale * y1, scale > 0.
template <int kNodes, Moment kMoment, int kCount>
SWS_HD void absorb(SharedPeakRow<kNodes, kMoment>& row, const float (&y0)[kCount], const float (&y1)[kCount],
                   float scale, AlphaNodes nodes) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  float greatest = y0[0];
  SWS_UNROLL
  for (int i = 1; i < kCount; ++i) greatest = fmaxf(greatest, y0[i]);
  if (scale * greatest > row.field[Row::kPeak] + kPeakSlack) rebase(row, scale * greatest);
  const float peak = row.field[Row::kPeak];
  const float base = scale * nodes.base;
  const float stride = scale * nodes.stride;
  SWS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float level = scale * y0[i] - peak;
    const float delta = y1[i] - y0[i];
    const float e = fast_exp2(level);
    row.field[Row::kMass] += e;
    if constexpr (kMoment != Moment::kNone) {
      row.field[Row::kMomentSum] += e * (kMoment == Moment::kLevel ? level : delta);
    }
    float weight = fast_exp2(level + base * delta);
    row.field[Row::kNodeMass] += weight;
    row.field[Row::kNodeDelta] += weight * delta;
    if constexpr (kNodes > 1) {
      row.field[Row::kGreatestDelta] = fmaxf(row.field[Row::kGreatestDelta], delta);
      const float step = fast_exp2(stride * delta);
      SWS_UNROLL
      for (int n = 1; n < kNodes; ++n) {
        weight *= step;
        row.field[Row::kNodeMass + n] += weight;
        row.field[Row::kNodeDelta + n] += weight * delta;
      }
    }
  }
}

template <int kNodes, Moment kMoment>
SWS_HD void merge(SharedPeakRow<kNodes, kMoment>& row, SharedPeakRow<kNodes, kMoment> other) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float peak = fmaxf(row.field[Row::kPeak], other.field[Row::kPeak]);
  rebase(row, peak);
  rebase(other, peak);
  SWS_UNROLL
  for (int i = Row::kMass; i < Row::kNodeDelta + kNodes; ++i) row.field[i] += other.field[i];
  if constexpr (kNodes > 1) {
    row.field[Row::kGreatestDelta] = fmaxf(row.field[Row::kGreatestDelta], other.field[Row::kGreatestDelta]);
  }
}

// Entropy of the row at alpha = 0, in nats: log Z - E[x0].
template <int kNodes>
SWS_HD float row_entropy(SharedPeakRow<kNodes, Moment::kLevel> const& row) {
  using Row = SharedPeakRow<kNodes, Moment::kLevel>;
  const float mass = row.field[Row::kMass];
  return kLn2 * (log2f(mass) - row.field[Row::kMomentSum] / mass);
}

// E_alpha[Delta] in nats.
template <int kNodes, Moment kMoment>
SWS_HD float row_node_mean_delta(SharedPeakRow<kNodes, kMoment> const& row, int node, float scale) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  return kLn2 * scale * (row.field[Row::kNodeDelta + node] / row.field[Row::kNodeMass + node]);
}

// KL(softmax(x(alpha)) || softmax(x0)) in nats, alpha E_alpha[Delta] - log(Z_alpha / Z_0); the peak cancels.
template <int kNodes, Moment kMoment>
SWS_HD float row_kl(SharedPeakRow<kNodes, kMoment> const& row, int node, float alpha, float scale) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float node_mass = row.field[Row::kNodeMass + node];
  return alpha * row_node_mean_delta(row, node, scale) - kLn2 * log2f(node_mass / row.field[Row::kMass]);
}

// E_0[Delta] in nats.
template <int kNodes>
SWS_HD float row_mean_delta(SharedPeakRow<kNodes, Moment::kDelta> const& row, float scale) {
  using Row = SharedPeakRow<kNodes, Moment::kDelta>;
  return kLn2 * scale * (row.field[Row::kMomentSum] / row.field[Row::kMass]);
}

// False if a node may have lost weights that matter, or if its sums overflowed. A weight at the first node below 2^-126
// becomes zero; at the last node it would be larger by at most the factor exp2(span), span the distance of the nodes
// times the greatest x1 - x0. 2^14 keys lose less than 2^-32 of a sum if the sum is 2^48 times that; the margin is for
// the sums of w (y1 - y0). No comparison with a NaN is true.
template <int kNodes, Moment kMoment>
SWS_HD bool is_reliable(SharedPeakRow<kNodes, kMoment> const& row, float scale, AlphaNodes nodes) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  float span = 0.0f;
  if constexpr (kNodes > 1) span = (nodes.at(kNodes - 1) - nodes.at(0)) * scale * row.field[Row::kGreatestDelta];
  const float least = fast_exp2(span - 78.0f);
  const float most = 0x1p100f;
  bool reliable = true;
  SWS_UNROLL
  for (int i = 0; i < kNodes; ++i) {
    const float mass = row.field[Row::kNodeMass + i];
    reliable = reliable && mass >= least && mass <= most;
  }
  return reliable;
}

// Row sums at alpha = 0 and at kNodes alphas, each relative to its own peak: accurate for any logits and any alpha in
// [0, 1], at one exponential for each pair and node.
template <int kNodeCount>
struct OwnPeakRow {
  static constexpr int kNodes = kNodeCount;
  static constexpr int kSums = kNodes + 1;  // node 0 is alpha = 0
  static constexpr int kFields = 3 * kSums;
  static constexpr int kPeak = 0;
  static constexpr int kMass = kSums;
  static constexpr int kDeltaSum = 2 * kSums;  // sum of weight times x1 - x0

  float field[kFields];
};

template <int kNodes>
SWS_HD void clear_row(OwnPeakRow<kNodes>& row) {
  using Row = OwnPeakRow<kNodes>;
  SWS_UNROLL
  for (int i = 0; i < Row::kFields; ++i) row.field[i] = i < Row::kMass ? kNoPeak : 0.0f;
}

template <int kNodes>
SWS_HD void raise_peak(OwnPeakRow<kNodes>& row, int sum, float peak) {
  using Row = OwnPeakRow<kNodes>;
  const float factor = fast_exp2(row.field[Row::kPeak + sum] - peak);
  row.field[Row::kMass + sum] *= factor;
  row.field[Row::kDeltaSum + sum] *= factor;
  row.field[Row::kPeak + sum] = peak;
}

// Adds keys whose logits are scale * y0 and scale * y1.
template <int kNodes, int kCount>
SWS_HD void absorb(OwnPeakRow<kNodes>& row, const float (&y0)[kCount], const float (&y1)[kCount], float scale,
                   AlphaNodes nodes) {
  using Row = OwnPeakRow<kNodes>;
  float x0[kCount];
  float delta[kCount];
  SWS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    x0[i] = scale * y0[i];
    delta[i] = scale * y1[i] - x0[i];
  }
  SWS_UNROLL
  for (int sum = 0; sum < Row::kSums; ++sum) {
    const float alpha = sum == 0 ? 0.0f : nodes.at(sum - 1);
    float peak = row.field[Row::kPeak + sum];
    SWS_UNROLL
    for (int i = 0; i < kCount; ++i) peak = fmaxf(peak, x0[i] + alpha * delta[i]);
    if (peak > row.field[Row::kPeak + sum]) raise_peak(row, sum, peak);
    SWS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float weight = fast_exp2((x0[i] + alpha * delta[i]) - peak);
      row.field[Row::kMass + sum] += weight;
      row.field[Row::kDeltaSum + sum] += weight * delta[i];
    }
  }
}

template <int kNodes>
SWS_HD void merge(OwnPeakRow<kNodes>& row, OwnPeakRow<kNodes> other) {
  using Row = OwnPeakRow<kNodes>;
  SWS_UNROLL
  for (int sum = 0; sum < Row::kSums; ++sum) {
    const float peak = fmaxf(row.field[Row::kPeak + sum], other.field[Row::kPeak + sum]);
    raise_peak(row, sum, peak);
    raise_peak(other, sum, peak);
    row.field[Row::kMass + sum] += other.field[Row::kMass + sum];
    row.field[Row::kDeltaSum + sum] += other.field[Row::kDeltaSum + sum];
  }
}

// KL(softmax(x(alpha)) || softmax(x0)) in nats: alpha E_alpha[Delta] - (log Z_alpha - log Z_0).
template <int kNodes>
SWS_HD float row_kl(OwnPeakRow<kNodes> const& row, int node, float alpha) {
  using Row = OwnPeakRow<kNodes>;
  const int sum = node + 1;
  const float rise = (row.field[Row::kPeak + sum] - row.field[Row::kPeak]) +
                     log2f(row.field[Row::kMass + sum] / row.field[Row::kMass]);
  return kLn2 * (alpha * (row.field[Row::kDeltaSum + sum] / row.field[Row::kMass + sum]) - rise);
}

}  // namespace sws
