// Banded transport on tensor cores, for float16 and bfloat16.
//
// A block computes a tile of 8 x 8 tokens from its halo of 24 columns; a warp computes two grid rows: 16 tokens, the M
// of m16n8k16. K is the sequence of "granules" of 8 neighbouring halo tokens that the diamonds of these 16 tokens
// touch, two granules per step. The weights are gathered once into A fragments, which stay in registers. The channels
// follow in double-buffered chunks of 32; each step is two ldmatrix and four mma, and A is not loaded again.
#pragma once

#include "banded_transport/tile.h"
#include "common/block.h"

namespace sws {

constexpr int kTransportThreads = 128;
constexpr int kChunkChannels = 32;
// Elements between two tokens in shared memory: 80 bytes, an odd multiple of 16, so ldmatrix has no bank conflict.
constexpr int kTokenStride = kChunkChannels + 8;
constexpr int kRowsPerWarp = 2;

// Tile geometry for every radius up to kReach.
template <int kReach>
struct BandGeometry {
  static constexpr int kHaloRows = kTileSide + 2 * kReach;
  static constexpr int kHaloTokens = kHaloRows * kHaloColumns;
  static constexpr int kStageElements = kHaloTokens * kTokenStride;
  static constexpr int kStageBytes = kStageElements * 2;
  static constexpr int kSharedBytes = 2 * kStageBytes;
  // Rows -kReach and kReach + 1 around a pair of rows touch the middle granule only, the others all three.
  static constexpr int kGranules = 2 + 3 * (2 * kReach);
  static constexpr int kSteps = kGranules / 2;
  static_assert(kGranules % 2 == 0, "granules are taken two at a time");
  static_assert(transport_weight_bytes(kReach) <= kStageBytes, "the weights pass through the second stage");
};

// Position of a granule: its row relative to the warp's first row, its column in units of 8 relative to the tile.
struct Granule {
  int row;
  int column;
};

template <int kReach>
SWS_HD constexpr Granule granule_at(int index) {
  if (index == 0) return Granule{-kReach, 0};
  if (index == BandGeometry<kReach>::kGranules - 1) return Granule{kReach + 1, 0};
  return Granule{-kReach + 1 + (index - 1) / 3, (index - 1) % 3 - 1};
}

// One element of a warp's A fragment: the weight from token (row, x) of its two rows to halo token `place` of a
// granule.
template <int kReach>
SWS_KERNEL_BODY float band_weight(Shared<float> weights, int radius, int warp, int row, int x, Granule granule,
                                  int place, int thread) {
  const GridOffset offset{granule.row - row, granule.column * kTileSide + place - x};
  if (!in_diamond(radius, offset)) return 0.0f;
  const int token = (warp * kRowsPerWarp + row) * kTileSide + x;
  return weights.load(offset_index(radius, offset) * kWeightStride + token, thread);
}

template <int kSteps>
struct BandFragments {
  uint32_t step[kSteps][4];
};

// Register r of A holds row lane / 4 (+ 8 for odd r), columns 2 (lane % 4) and the next (+ 8 for r >= 2). With 8
// tokens a grid row, "+ 8 rows" is the warp's second grid row and "+ 8 columns" the step's second granule.
template <typename Element, int kReach, typename BlockType>
SWS_KERNEL_BODY void gather_band(BlockType& block, Shared<float> weights, int radius,
                                 PerThread<BandFragments<BandGeometry<kReach>::kSteps>, kTransportThreads>& band) {
  block.each_thread([&](int thread) {
    const int warp = thread / 32;
    const int x = (thread % 32) / 4;
    const int place = 2 * (thread % 4);
    SWS_UNROLL
    for (int step = 0; step < BandGeometry<kReach>::kSteps; ++step) {
      SWS_UNROLL
      for (int r = 0; r < 4; ++r) {
        const Granule granule = granule_at<kReach>(2 * step + r / 2);
        const float low = band_weight<kReach>(weights, radius, warp, r % 2, x, granule, place, thread);
        const float high = band_weight<kReach>(weights, radius, warp, r % 2, x, granule, place + 1, thread);
        band[thread].step[step][r] = pack_pair<Element>(low, high);
      }
    }
  });
}

// Starts the copy of one channel chunk of the halo. Tokens outside the grid, channels past the end and the corners of
// the halo that no diamond reaches become zeros. A thread copies one vector of the chunk for a sequence of tokens and
// updates their position incrementally, without divisions.
template <typename Element, int kReach, typename BlockType>
SWS_KERNEL_BODY void start_chunk_copy(BlockType& block, TransportProblem const& problem, int sample,
                                      GridPosition origin, int chunk, Shared<Element> stage) {
  constexpr int kVectors = kChunkChannels / 8;
  constexpr int kTokensAtOnce = kTransportThreads / kVectors;
  static_assert(kTokensAtOnce >= kHaloColumns && kTokensAtOnce < 2 * kHaloColumns, "a step is a row and some columns");
  const ChannelChunks chunks = channel_chunks(problem, kChunkChannels);
  const auto* input = static_cast<const Element*>(input_of(problem, chunk / chunks.per_tensor));
  const int first_channel = (chunk % chunks.per_tensor) * kChunkChannels;
  block.each_thread([&](int thread) {
    const int vector = thread % kVectors;
    const int channel = first_channel + vector * 8;
    const bool has_channel = channel < problem.channels;
    const Element* first_token = input + token_start(problem, sample, GridPosition{0, 0}) + (has_channel ? channel : 0);
    int row = thread / kVectors / kHaloColumns;
    int column = thread / kVectors % kHaloColumns;
    for (int token = thread / kVectors; token < BandGeometry<kReach>::kHaloTokens; token += kTokensAtOnce) {
      const GridPosition place{row - kReach, column - kMaxTransportRadius};
      const GridPosition at{origin.y + place.y, origin.x + place.x};
      const bool valid = has_channel & in_grid(problem, at) & (steps_to_tile(place) <= problem.radius);
      const int64_t tokens_on = valid ? at.y * problem.width + at.x : 0;
      const Element* from = first_token + tokens_on * problem.channels;
      block.copy_16_bytes(stage, token * kTokenStride + vector * 8, from, valid, thread);
      column += kTokensAtOnce - kHaloColumns;
      row += column < kHaloColumns ? 1 : 2;
      column -= column < kHaloColumns ? 0 : kHaloColumns;
    }
  });
}

constexpr int kColumnTiles = kChunkChannels / 8;

struct ChunkSums {
  float value[kColumnTiles][4];
};

// sums = band (16 x K) times the chunk (K x 32), for each warp.
template <typename Element, int kReach, typename BlockType>
SWS_KERNEL_BODY void multiply_chunk(BlockType& block, Shared<Element> stage,
                                    PerThread<BandFragments<BandGeometry<kReach>::kSteps>, kTransportThreads>& band,
                                    PerThread<ChunkSums, kTransportThreads>& sums) {
  struct Registers {
    uint32_t value[4];
  };
  PerThread<Registers, kTransportThreads> columns;
  SWS_UNROLL
  for (int step = 0; step < BandGeometry<kReach>::kSteps; ++step) {
    SWS_UNROLL
    for (int pair = 0; pair < kColumnTiles / 2; ++pair) {
      // Matrices in order: first and second granule of channels 0-7, then both of channels 8-15.
      auto row_index = [&](int thread) {
        const int lane = thread % 32;
        const Granule first = granule_at<kReach>(2 * step);
        const Granule second = granule_at<kReach>(2 * step + 1);
        const bool use_second = (lane / 8) % 2 == 1;
        const int row = (thread / 32) * kRowsPerWarp + kReach + (use_second ? second.row : first.row);
        const int column = kMaxTransportRadius + (use_second ? second.column : first.column) * kTileSide + lane % 8;
        return (row * kHaloColumns + column) * kTokenStride + pair * 16 + (lane / 16) * 8;
      };
      block.template load_matrices<true>(stage, row_index, [&](int thread) { return columns[thread].value; });
      SWS_UNROLL
      for (int half = 0; half < 2; ++half) {
        auto result = [&](int thread) { return sums[thread].value[2 * pair + half]; };
        auto weights = [&](int thread) { return band[thread].step[step]; };
        auto values = [&](int thread) { return columns[thread].value + 2 * half; };
        if (step == 0) {
          block.template multiply<Element>(result, weights, values);
        } else {
          block.template multiply_add<Element>(result, weights, values);
        }
      }
    }
  }
}

template <typename Element, typename BlockType>
SWS_KERNEL_BODY void store_chunk(BlockType& block, TransportProblem const& problem, int sample, GridPosition origin,
                                 int chunk, PerThread<ChunkSums, kTransportThreads>& sums) {
  const ChannelChunks chunks = channel_chunks(problem, kChunkChannels);
  auto* output = static_cast<Element*>(output_of(problem, chunk / chunks.per_tensor));
  const int first_channel = (chunk % chunks.per_tensor) * kChunkChannels;
  block.each_thread([&](int thread) {
    const int lane = thread % 32;
    SWS_UNROLL
    for (int row = 0; row < kRowsPerWarp; ++row) {
      const GridPosition at{origin.y + (thread / 32) * kRowsPerWarp + row, origin.x + lane / 4};
      if (!in_grid(problem, at)) continue;
      Element* token = output + token_start(problem, sample, at);
      SWS_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        const int channel = first_channel + n * 8 + 2 * (lane % 4);
        if (channel >= problem.channels) continue;
        const uint32_t pair = pack_pair<Element>(sums[thread].value[n][2 * row], sums[thread].value[n][2 * row + 1]);
        block.store_pair(token + channel, pair);
      }
    }
  });
}

// Grid: x = tile, y = part of the channel chunks, z = sample. Needs channels % 8 == 0, radius <= kReach and
// BandGeometry<kReach>::kSharedBytes of shared memory.
template <typename Element, int kReach, typename BlockType>
SWS_KERNEL_BODY void transport_tensor_core(BlockType& block, TransportProblem const& problem, int parts) {
  using Geometry = BandGeometry<kReach>;
  const GridPosition origin = tile_origin(problem, block.x());
  const int sample = block.z();
  const ChunkRange range = chunk_range(channel_chunks(problem, kChunkChannels).total, block.y(), parts);
  Shared<float> weights = block.template shared<float>(Geometry::kStageBytes, Geometry::kStageBytes / 4);
  auto stage_of = [&](int chunk) {
    const int offset = ((chunk - range.first) % 2) * Geometry::kStageBytes;
    return block.template shared<Element>(offset, Geometry::kStageElements);
  };

  if (range.first >= range.last) return;

  start_chunk_copy<Element, kReach>(block, problem, sample, origin, range.first, stage_of(range.first));
  block.commit_copies();
  start_weights_copy(block, problem, sample, origin, weights);
  block.commit_copies();
  block.template wait_copies<0>();
  block.sync();
  PerThread<BandFragments<Geometry::kSteps>, kTransportThreads> band;
  gather_band<Element, kReach>(block, weights, problem.radius, band);
  block.sync();

  PerThread<ChunkSums, kTransportThreads> sums;
  for (int chunk = range.first; chunk < range.last; ++chunk) {
    if (chunk + 1 < range.last) {
      start_chunk_copy<Element, kReach>(block, problem, sample, origin, chunk + 1, stage_of(chunk + 1));
    }
    block.commit_copies();
    block.template wait_copies<1>();
    block.sync();
    multiply_chunk<Element, kReach>(block, stage_of(chunk), band, sums);
    block.sync();
    store_chunk<Element>(block, problem, sample, origin, chunk, sums);
  }
}

}  // namespace sws
