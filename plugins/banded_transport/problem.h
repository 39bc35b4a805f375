// Arguments of a banded transport.
#pragma once

#include "banded_transport/offsets.h"
#include "common/number_formats.h"

namespace sws {

constexpr int kMaxTransportRadius = 8;
constexpr int kMaxTransportTensors = 2;

// y_n[b, i, c] = sum over j of weights[b, j, i] * x_n[b, i + offset_j, c] for n < tensors; i = y * width + x.
// weights is [batch, K(radius), height, width] float32; x_n and y_n are [batch, height * width, channels].
struct TransportProblem {
  const float* weights;
  const void* inputs[kMaxTransportTensors];
  void* outputs[kMaxTransportTensors];
  int tensors;
  int batch;
  int height;
  int width;
  int channels;
  int radius;
  NumberFormat format;
};

}  // namespace sws
