// Banded transport in scalar float arithmetic: float32, and 16-bit tensors whose number of channels is not a multiple
// of 8.
//
// A block computes a tile of 8 x 8 tokens; a thread computes one channel of one tile row, for which a window of 8
// inputs moves along the halo row.
#pragma once

#include "banded_transport/tile.h"
#include "common/block.h"

namespace sws {

constexpr int kScalarChannels = 16;
constexpr int kScalarThreads = kTileSide * kScalarChannels;

SWS_HD constexpr int scalar_halo_rows(int radius) { return kTileSide + 2 * radius; }

SWS_HD constexpr int scalar_input_count(int radius) {
  return scalar_halo_rows(radius) * scalar_halo_rows(radius) * kScalarChannels;
}

SWS_HD constexpr int scalar_transport_bytes(int radius) {
  return transport_weight_bytes(radius) + scalar_input_count(radius) * static_cast<int>(sizeof(float));
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void stage_inputs(BlockType& block, TransportProblem const& problem, int sample, GridPosition origin,
                                  const Element* input, int first_channel, Shared<float> halo) {
  const int side = scalar_halo_rows(problem.radius);
  block.each_thread([&](int thread) {
    for (int i = thread; i < scalar_input_count(problem.radius); i += kScalarThreads) {
      const int token = i / kScalarChannels;
      const int channel = first_channel + i % kScalarChannels;
      const GridPosition at{origin.y - problem.radius + token / side, origin.x - problem.radius + token % side};
      const bool valid = in_grid(problem, at) && channel < problem.channels;
      halo.store(i, valid ? to_float(input[token_start(problem, sample, at) + channel]) : 0.0f, thread);
    }
  });
}

struct RowSums {
  float value[kTileSide];
};

// Sums of tile row `row`: for each offset row, a window of 8 inputs moves along dx.
SWS_KERNEL_BODY RowSums sum_row(TransportProblem const& problem, Shared<float> weights, Shared<float> halo, int row,
                                int channel, int thread) {
  const int side = scalar_halo_rows(problem.radius);
  RowSums sums = {};
  int index = 0;
  for (int dy = -problem.radius; dy <= problem.radius; ++dy) {
    const int reach = problem.radius - absolute(dy);
    const int first_token = (row + problem.radius + dy) * side + problem.radius - reach;
    float window[kTileSide];
    SWS_UNROLL
    for (int i = 0; i < kTileSide; ++i) {
      window[i] = halo.load((first_token + i) * kScalarChannels + channel, thread);
    }
    for (int dx = 0; dx <= 2 * reach; ++dx, ++index) {
      SWS_UNROLL
      for (int i = 0; i < kTileSide; ++i) {
        sums.value[i] += weights.load(index * kWeightStride + row * kTileSide + i, thread) * window[i];
      }
      if (dx == 2 * reach) continue;
      SWS_UNROLL
      for (int i = 0; i + 1 < kTileSide; ++i) window[i] = window[i + 1];
      window[kTileSide - 1] = halo.load((first_token + dx + kTileSide) * kScalarChannels + channel, thread);
    }
  }
  return sums;
}

// Grid: x = tile, y = part of the channel chunks, z = sample. Needs scalar_transport_bytes(radius) of shared memory.
template <typename Element, typename BlockType>
SWS_KERNEL_BODY void transport_scalar(BlockType& block, TransportProblem const& problem, int parts) {
  const GridPosition origin = tile_origin(problem, block.x());
  const int sample = block.z();
  const ChannelChunks chunks = channel_chunks(problem, kScalarChannels);
  const ChunkRange range = chunk_range(chunks.total, block.y(), parts);
  Shared<float> weights = block.template shared<float>(0, offset_count(problem.radius) * kWeightStride);
  Shared<float> halo =
      block.template shared<float>(transport_weight_bytes(problem.radius), scalar_input_count(problem.radius));

  start_weights_copy(block, problem, sample, origin, weights);
  block.commit_copies();
  block.template wait_copies<0>();
  for (int chunk = range.first; chunk < range.last; ++chunk) {
    const int tensor = chunk / chunks.per_tensor;
    const int first_channel = (chunk % chunks.per_tensor) * kScalarChannels;
    stage_inputs(block, problem, sample, origin, static_cast<const Element*>(input_of(problem, tensor)), first_channel,
                 halo);
    block.sync();
    block.each_thread([&](int thread) {
      const int row = thread / kScalarChannels;
      const int channel = thread % kScalarChannels;
      const RowSums sums = sum_row(problem, weights, halo, row, channel, thread);
      if (first_channel + channel >= problem.channels) return;
      auto* output = static_cast<Element*>(output_of(problem, tensor));
      SWS_UNROLL
      for (int i = 0; i < kTileSide; ++i) {
        const GridPosition at{origin.y + row, origin.x + i};
        if (!in_grid(problem, at)) continue;
        output[token_start(problem, sample, at) + first_channel + channel] = from_float<Element>(sums.value[i]);
      }
    });
    block.sync();
  }
}

}  // namespace sws
