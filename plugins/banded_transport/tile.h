// Shared by both transport kernels: the 8 x 8 token tile and its weights in shared memory.
#pragma once

#include <cstdint>

#include "banded_transport/problem.h"
#include "common/block.h"

namespace sws {

constexpr int kTileSide = 8;
constexpr int kTileTokens = kTileSide * kTileSide;
// Words between the weights of one offset and the next: 4 modulo 32, so that the skewed reads of the tensor-core
// kernel access 32 different banks.
constexpr int kWeightStride = kTileTokens + 4;
// Columns of the tile with its halo, for every radius.
constexpr int kHaloColumns = kTileSide + 2 * kMaxTransportRadius;

struct GridPosition {
  int y;
  int x;
};

SWS_HD bool in_grid(TransportProblem const& problem, GridPosition position) {
  // A negative number is a large unsigned one; `&` because a branch costs more than a comparison.
  return (static_cast<unsigned>(position.y) < static_cast<unsigned>(problem.height)) &
         (static_cast<unsigned>(position.x) < static_cast<unsigned>(problem.width));
}

SWS_HD int tile_columns(TransportProblem const& problem) { return (problem.width + kTileSide - 1) / kTileSide; }

SWS_HD int tile_rows(TransportProblem const& problem) { return (problem.height + kTileSide - 1) / kTileSide; }

// Upper left token of a tile.
SWS_HD GridPosition tile_origin(TransportProblem const& problem, int tile) {
  const int columns = tile_columns(problem);
  return GridPosition{(tile / columns) * kTileSide, (tile % columns) * kTileSide};
}

SWS_HD int64_t token_start(TransportProblem const& problem, int sample, GridPosition position) {
  const int64_t token = static_cast<int64_t>(position.y) * problem.width + position.x;
  return (static_cast<int64_t>(sample) * problem.height * problem.width + token) * problem.channels;
}

SWS_HD constexpr int transport_weight_bytes(int radius) {
  return offset_count(radius) * kWeightStride * static_cast<int>(sizeof(float));
}

// Starts copying the weights of the tile as [offset][token of the tile]. A weight whose neighbour (or whose token) lies
// outside the grid becomes zero, whatever its value in the tensor. A thread copies every kRowGroups-th row of the
// diamond of one token, so the loop has little arithmetic and does not wait.
template <typename BlockType>
SWS_KERNEL_BODY void start_weights_copy(BlockType& block, TransportProblem const& problem, int sample,
                                        GridPosition origin, Shared<float> weights) {
  constexpr int kRowGroups = BlockType::kThreads / kTileTokens;
  static_assert(kRowGroups * kTileTokens == BlockType::kThreads, "every token has as many threads");
  const int radius = problem.radius;
  const int64_t plane = static_cast<int64_t>(problem.height) * problem.width;
  const float* band = problem.weights + static_cast<int64_t>(sample) * offset_count(radius) * plane;
  block.each_thread([&](int thread) {
    const int token = thread % kTileTokens;
    const GridPosition at{origin.y + token / kTileSide, origin.x + token % kTileSide};
    const bool exists = in_grid(problem, at);
    const float* source = exists ? band + static_cast<int64_t>(at.y) * problem.width + at.x : band;
    for (int dy = -radius + thread / kTileTokens; dy <= radius; dy += kRowGroups) {
      const int reach = radius - absolute(dy);
      int index = offset_index(radius, GridOffset{dy, -reach});
      for (int dx = -reach; dx <= reach; ++dx, ++index) {
        const bool inside = exists && in_grid(problem, GridPosition{at.y + dy, at.x + dx});
        block.copy_4_bytes(weights, index * kWeightStride + token, inside ? source + index * plane : band, inside,
                           thread);
      }
    }
  });
}

// Steps from a place beside the tile to the nearest token of it; places are relative to the tile's first token.
SWS_HD int larger(int a, int b) { return a < b ? b : a; }

SWS_HD int steps_along(int place) { return larger(larger(-place, place - kTileSide + 1), 0); }

SWS_HD int steps_to_tile(GridPosition place) { return steps_along(place.y) + steps_along(place.x); }

// A conditional instead of an index: indexing kernel parameters at run time would copy them to local memory.
SWS_HD const void* input_of(TransportProblem const& problem, int tensor) {
  return tensor == 0 ? problem.inputs[0] : problem.inputs[1];
}

SWS_HD void* output_of(TransportProblem const& problem, int tensor) {
  return tensor == 0 ? problem.outputs[0] : problem.outputs[1];
}

// The channels of all tensors, divided into chunks of `size`; a chunk never spans two tensors.
struct ChannelChunks {
  int per_tensor;
  int total;
};

SWS_HD ChannelChunks channel_chunks(TransportProblem const& problem, int size) {
  const int per_tensor = (problem.channels + size - 1) / size;
  return ChannelChunks{per_tensor, per_tensor * problem.tensors};
}

// Chunks [first, last) of one block if `blocks` blocks share the chunks.
struct ChunkRange {
  int first;
  int last;
};

SWS_HD ChunkRange chunk_range(int total, int block, int blocks) {
  const int each = (total + blocks - 1) / blocks;
  const int first = block * each;
  const int last = first + each;
  return ChunkRange{first < total ? first : total, last < total ? last : total};
}

}  // namespace sws
