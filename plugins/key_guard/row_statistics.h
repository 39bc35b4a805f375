// Statistics of one row of logits, accumulated in a single pass over the keys. Logits are in units of log 2.
//
// A row receives pairs (x0, x1): the logits under k and under P k; x(alpha) = x0 + alpha (x1 - x0). Sums of exp2(x) are
// relative to running maxima ("peaks") and are rescaled when a maximum rises, so nothing overflows.
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

// How far, in units of log 2, x0 and x1 may exceed the peaks of a SharedPeakRow before its sums are rescaled. Rescaling
// at each new maximum would happen in some thread of a warp in most steps; weights up to 2^4 cost no accuracy.
constexpr float kPeakSlack = 4.0f;

// What a SharedPeakRow sums at alpha = 0 besides the weights e = exp2(x0 - peak0).
enum class Moment {
  kNone,
  kLevel,  // e (x0 - peak0), for the entropy
  kDrift,  // e d, d = (x1 - peak1) - (x0 - peak0), for E_0[Delta]
};

// Row sums at alpha = 0 and at kNodes other alphas ("nodes"), all relative to two peaks: max x0 and max x1, or up to
// kPeakSlack less. Costs one exponential for alpha = 0, one for the first node and, with several nodes, one for the
// factor from each node to the next. Not accurate if no key is near the peak of x(alpha), see is_reliable.
template <int kNodeCount, Moment kMomentKind>
struct SharedPeakRow {
  static constexpr int kNodes = kNodeCount;
  static constexpr Moment kMoment = kMomentKind;
  static constexpr int kMomentSums = kMoment == Moment::kNone ? 0 : 1;
  static constexpr int kFields = 3 + kMomentSums + 2 * kNodes;
  static constexpr int kPeak0 = 0;
  static constexpr int kPeak1 = 1;
  static constexpr int kMass = 2;                        // sum of e
  static constexpr int kMomentSum = 3;                   // if there is one
  static constexpr int kNodeMass = 3 + kMomentSums;      // sum of w = exp2((x0 - peak0) + alpha d)
  static constexpr int kNodeDrift = kNodeMass + kNodes;  // sum of w d

  float field[kFields];
};

template <int kNodes, Moment kMoment>
SWS_HD void clear_row(SharedPeakRow<kNodes, kMoment>& row) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  SWS_UNROLL
  for (int i = 0; i < Row::kFields; ++i) row.field[i] = 0.0f;
  row.field[Row::kPeak0] = kNoPeak;
  row.field[Row::kPeak1] = kNoPeak;
}

// Expresses the sums relative to other peaks, which are not lower.
template <int kNodes, Moment kMoment>
SWS_HD void rebase(SharedPeakRow<kNodes, kMoment>& row, float peak0, float peak1, AlphaNodes nodes) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float fall = row.field[Row::kPeak0] - peak0;
  const float shift = (row.field[Row::kPeak1] - peak1) - fall;
  const float factor = fast_exp2(fall);
  const float mass = row.field[Row::kMass];
  if constexpr (kMoment != Moment::kNone) {
    const float change = kMoment == Moment::kLevel ? fall : shift;
    row.field[Row::kMomentSum] = factor * (row.field[Row::kMomentSum] + mass * change);
  }
  row.field[Row::kMass] = factor * mass;
  SWS_UNROLL
  for (int i = 0; i < kNodes; ++i) {
    const float node_factor = fast_exp2(fall + nodes.at(i) * shift);
    const float node_mass = row.field[Row::kNodeMass + i];
    row.field[Row::kNodeDrift + i] = node_factor * (row.field[Row::kNodeDrift + i] + node_mass * shift);
    row.field[Row::kNodeMass + i] = node_factor * node_mass;
  }
  row.field[Row::kPeak0] = peak0;
  row.field[Row::kPeak1] = peak1;
}

// Limit of the exponent of the factor between two nodes, so that it stays finite. It discards no weight that matters: a
// pair beyond it has d > 64 / stride >= 256 for alpha = 2 stride <= 1/2, hence x0 - peak0 < kPeakSlack - 256, and its
// weight at alpha is below 2^-122.
constexpr float kLargestStepLog2 = 64.0f;

// Adds keys whose logits are scale * y0 and scale * y1, scale > 0.
template <int kNodes, Moment kMoment, int kCount>
SWS_HD void absorb(SharedPeakRow<kNodes, kMoment>& row, const float (&y0)[kCount], const float (&y1)[kCount],
                   float scale, AlphaNodes nodes) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  float greatest0 = y0[0];
  float greatest1 = y1[0];
  SWS_UNROLL
  for (int i = 1; i < kCount; ++i) {
    greatest0 = fmaxf(greatest0, y0[i]);
    greatest1 = fmaxf(greatest1, y1[i]);
  }
  const bool rises = scale * greatest0 > row.field[Row::kPeak0] + kPeakSlack ||
                     scale * greatest1 > row.field[Row::kPeak1] + kPeakSlack;
  if (rises) {
    rebase(row, fmaxf(row.field[Row::kPeak0], scale * greatest0), fmaxf(row.field[Row::kPeak1], scale * greatest1),
           nodes);
  }
  const float peak0 = row.field[Row::kPeak0];
  const float peak1 = row.field[Row::kPeak1];
  SWS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float level = scale * y0[i] - peak0;
    const float d = (scale * y1[i] - peak1) - level;
    const float e = fast_exp2(level);
    row.field[Row::kMass] += e;
    if constexpr (kMoment != Moment::kNone) row.field[Row::kMomentSum] += e * (kMoment == Moment::kLevel ? level : d);
    float weight = fast_exp2(level + nodes.base * d);
    row.field[Row::kNodeMass] += weight;
    row.field[Row::kNodeDrift] += weight * d;
    if constexpr (kNodes > 1) {
      const float step = fast_exp2(fminf(nodes.stride * d, kLargestStepLog2));
      SWS_UNROLL
      for (int n = 1; n < kNodes; ++n) {
        weight *= step;
        row.field[Row::kNodeMass + n] += weight;
        row.field[Row::kNodeDrift + n] += weight * d;
      }
    }
  }
}

template <int kNodes, Moment kMoment>
SWS_HD void merge(SharedPeakRow<kNodes, kMoment>& row, SharedPeakRow<kNodes, kMoment> other, AlphaNodes nodes) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float peak0 = fmaxf(row.field[Row::kPeak0], other.field[Row::kPeak0]);
  const float peak1 = fmaxf(row.field[Row::kPeak1], other.field[Row::kPeak1]);
  rebase(row, peak0, peak1, nodes);
  rebase(other, peak0, peak1, nodes);
  SWS_UNROLL
  for (int i = Row::kMass; i < Row::kFields; ++i) row.field[i] += other.field[i];
}

// Entropy of the row at alpha = 0, in nats: log Z - E[x0].
template <int kNodes>
SWS_HD float row_entropy(SharedPeakRow<kNodes, Moment::kLevel> const& row) {
  using Row = SharedPeakRow<kNodes, Moment::kLevel>;
  const float mass = row.field[Row::kMass];
  return kLn2 * (log2f(mass) - row.field[Row::kMomentSum] / mass);
}

// KL(softmax(x(alpha)) || softmax(x0)) in nats, alpha E_alpha[Delta] - log(Z_alpha / Z_0); the peaks cancel.
template <int kNodes, Moment kMoment>
SWS_HD float row_kl(SharedPeakRow<kNodes, kMoment> const& row, int node, float alpha) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float node_mass = row.field[Row::kNodeMass + node];
  return kLn2 * (alpha * (row.field[Row::kNodeDrift + node] / node_mass) - log2f(node_mass / row.field[Row::kMass]));
}

// E_alpha[Delta] in nats. Unlike KL it contains the difference of the peaks and so is less accurate if that is large.
template <int kNodes, Moment kMoment>
SWS_HD float row_node_drift(SharedPeakRow<kNodes, kMoment> const& row, int node) {
  using Row = SharedPeakRow<kNodes, kMoment>;
  const float peaks = row.field[Row::kPeak1] - row.field[Row::kPeak0];
  return kLn2 * (row.field[Row::kNodeDrift + node] / row.field[Row::kNodeMass + node] + peaks);
}

// E_0[Delta] in nats.
template <int kNodes>
SWS_HD float row_drift(SharedPeakRow<kNodes, Moment::kDrift> const& row) {
  using Row = SharedPeakRow<kNodes, Moment::kDrift>;
  const float peaks = row.field[Row::kPeak1] - row.field[Row::kPeak0];
  return kLn2 * (row.field[Row::kMomentSum] / row.field[Row::kMass] + peaks);
}

// False if a node may have lost weights that matter. A weight at the first node below 2^-126 becomes zero; its factor
// to the last node may raise it to about 2^(-126 (1 - last) / (1 - first)). 2^14 keys lose less than 2^-32 of the sum
// if the sum is 2^48 times that; the margin is for the sums of w d. With a single node the bound is 2^-78.
template <int kNodes, Moment kMoment>
SWS_HD bool is_reliable(SharedPeakRow<kNodes, kMoment> const& row, AlphaNodes nodes) {
  const float range = kNodes == 1 ? 1.0f : (1.0f - nodes.at(kNodes - 1)) / (1.0f - nodes.at(0));
  const float least = fast_exp2(48.0f - 126.0f * range);
  bool reliable = true;
  SWS_UNROLL
  for (int i = 0; i < kNodes; ++i) {
    reliable = reliable && row.field[SharedPeakRow<kNodes, kMoment>::kNodeMass + i] >= least;
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
  static constexpr int kDrift = 2 * kSums;  // sum of weight times x1 - x0

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
  row.field[Row::kDrift + sum] *= factor;
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
      row.field[Row::kDrift + sum] += weight * delta[i];
    }
  }
}

template <int kNodes>
SWS_HD void merge(OwnPeakRow<kNodes>& row, OwnPeakRow<kNodes> other, AlphaNodes /*nodes*/) {
  using Row = OwnPeakRow<kNodes>;
  SWS_UNROLL
  for (int sum = 0; sum < Row::kSums; ++sum) {
    const float peak = fmaxf(row.field[Row::kPeak + sum], other.field[Row::kPeak + sum]);
    raise_peak(row, sum, peak);
    raise_peak(other, sum, peak);
    row.field[Row::kMass + sum] += other.field[Row::kMass + sum];
    row.field[Row::kDrift + sum] += other.field[Row::kDrift + sum];
  }
}

// KL(softmax(x(alpha)) || softmax(x0)) in nats: alpha E_alpha[Delta] - (log Z_alpha - log Z_0).
template <int kNodes>
SWS_HD float row_kl(OwnPeakRow<kNodes> const& row, int node, float alpha) {
  using Row = OwnPeakRow<kNodes>;
  const int sum = node + 1;
  const float rise = (row.field[Row::kPeak + sum] - row.field[Row::kPeak]) +
                     log2f(row.field[Row::kMass + sum] / row.field[Row::kMass]);
  return kLn2 * (alpha * (row.field[Row::kDrift + sum] / row.field[Row::kMass + sum]) - rise);
}

}  // namespace sws
