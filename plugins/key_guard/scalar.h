// The guard's passes in scalar float arithmetic, for any number format and head size: all rounds of float32 tensors,
// and every search round, which must be accurate and is rare.
//
// A block processes 32 query rows of one head; each of its 16 x 16 threads holds 2 rows by 4 keys of both logit tiles.
#pragma once

#include "key_guard/round.h"

namespace sws {

constexpr int kScalarGuardThreads = 256;
constexpr int kScalarRows = kSmallestRowTile;
constexpr int kScalarKeys = 64;
constexpr int kScalarDepth = 16;                 // channels of a head in shared memory at a time
constexpr int kScalarStride = kScalarDepth + 1;  // odd: 16 threads that read 16 rows access 16 banks
constexpr int kLanes = 16;                       // threads that share a row
constexpr int kLaneRows = 2;
constexpr int kLaneKeys = kScalarKeys / kLanes;

constexpr int kScalarQueryBytes = kScalarRows * kScalarStride * 4;
constexpr int kScalarKeyBytes = kScalarKeys * kScalarStride * 4;
constexpr int kScalarGuardBytes = kScalarQueryBytes + 2 * kScalarKeyBytes;
constexpr int kScalarResultBytes = row_result_bytes<SearchPass, kScalarRows>();
static_assert(kScalarRows == kScalarGuardThreads / kLanes * kLaneRows, "every row has its threads");
static_assert(kScalarResultBytes + kPartBytes <= kScalarGuardBytes && kDigestBytes <= kScalarGuardBytes,
              "the reductions reuse the memory of the tiles");

// Copies channels [first_channel, first_channel + 16) of `rows` rows of one head as float; zeros outside the tensor.
template <typename Element, typename BlockType>
SWS_KERNEL_BODY void load_rows(BlockType& block, GuardProblem const& problem, int sample, int head, TokenRows tensor,
                               int first_token, int first_channel, int rows, Shared<float> to) {
  const auto* elements = static_cast<const Element*>(tensor.data);
  block.each_thread([&](int thread) {
    for (int i = thread; i < rows * kScalarDepth; i += kScalarGuardThreads) {
      const int row = i / kScalarDepth;
      const int channel = first_channel + i % kScalarDepth;
      const int token = first_token + row;
      const bool valid = token < tensor.tokens && channel < problem.head_size;
      const float value = valid ? to_float(elements[head_start(problem, tensor, sample, token, head) + channel]) : 0.0f;
      to.store(row * kScalarStride + i % kScalarDepth, value, thread);
    }
  });
}

struct ScalarLogits {
  float base[kLaneRows][kLaneKeys];
  float permuted[kLaneRows][kLaneKeys];
};

// Adds the products over the channels in shared memory.
SWS_KERNEL_BODY void add_products(Shared<float> queries, Shared<float> keys, Shared<float> permuted, int thread,
                                  ScalarLogits& logits) {
  const int first_row = thread / kLanes * kLaneRows;
  const int first_key = thread % kLanes;
  SWS_UNROLL
  for (int d = 0; d < kScalarDepth; ++d) {
    float q[kLaneRows];
    SWS_UNROLL
    for (int r = 0; r < kLaneRows; ++r) q[r] = queries.load((first_row + r) * kScalarStride + d, thread);
    SWS_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      const int at = (first_key + i * kLanes) * kScalarStride + d;
      const float key = keys.load(at, thread);
      const float permuted_key = permuted.load(at, thread);
      SWS_UNROLL
      for (int r = 0; r < kLaneRows; ++r) {
        logits.base[r][i] += q[r] * key;
        logits.permuted[r][i] += q[r] * permuted_key;
      }
    }
  }
}

template <typename Row>
struct LaneRowSums {
  Row row[kLaneRows];
};

// Adds a thread's logits to its rows; keys from `keys_left` on do not exist and get a logit without weight.
template <typename Row>
SWS_KERNEL_BODY void absorb_scalar_logits(ScalarLogits& logits, float scale, int thread, int keys_left,
                                          AlphaNodes nodes, LaneRowSums<Row>& rows) {
  SWS_UNROLL
  for (int r = 0; r < kLaneRows; ++r) {
    SWS_UNROLL
    for (int i = 0; i < kLaneKeys; ++i) {
      if (thread % kLanes + i * kLanes < keys_left) continue;
      logits.base[r][i] = kPaddedLogit / scale;
      logits.permuted[r][i] = kPaddedLogit / scale;
    }
    absorb(rows.row[r], logits.base[r], logits.permuted[r], scale, nodes);
  }
}

template <typename Row, typename BlockType>
SWS_KERNEL_BODY void merge_scalar_lanes(BlockType& block, PerThread<LaneRowSums<Row>, kScalarGuardThreads>& rows) {
  for (int mask = 1; mask < kLanes; mask *= 2) {
    SWS_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      PerThread<Row, kScalarGuardThreads> theirs;
      SWS_UNROLL
      for (int f = 0; f < Row::kFields; ++f) {
        PerThread<float, kScalarGuardThreads> values;
        block.each_thread([&](int thread) { values[thread] = rows[thread].row[r].field[f]; });
        block.shuffle_xor(values, mask);
        block.each_thread([&](int thread) { theirs[thread].field[f] = values[thread]; });
      }
      block.each_thread([&](int thread) { merge(rows[thread].row[r], theirs[thread]); });
    }
  }
}

// Processes all keys for 32 rows of one head and writes their record.
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_scalar_tile(BlockType& block, GuardProblem const& problem, int sample, int head,
                                         int first_row, AlphaNodes nodes, double* record) {
  using Row = typename Pass::Row;
  Shared<float> queries = block.template shared<float>(0, kScalarRows * kScalarStride);
  Shared<float> keys = block.template shared<float>(kScalarQueryBytes, kScalarKeys * kScalarStride);
  Shared<float> permuted =
      block.template shared<float>(kScalarQueryBytes + kScalarKeyBytes, kScalarKeys * kScalarStride);
  const float scale = logit_scale(problem, sample);
  PerThread<LaneRowSums<Row>, kScalarGuardThreads> rows;
  PerThread<ScalarLogits, kScalarGuardThreads> logits;
  block.each_thread([&](int thread) {
    SWS_UNROLL
    for (int r = 0; r < kLaneRows; ++r) clear_row(rows[thread].row[r]);
  });

  for (int first_key = 0; first_key < problem.tokens; first_key += kScalarKeys) {
    block.each_thread([&](int thread) { logits[thread] = ScalarLogits{}; });
    for (int depth = 0; depth < problem.head_size; depth += kScalarDepth) {
      load_rows<Element>(block, problem, sample, head, query_rows(problem), first_row, depth, kScalarRows, queries);
      load_rows<Element>(block, problem, sample, head, key_rows(problem), first_key, depth, kScalarKeys, keys);
      load_rows<Element>(block, problem, sample, head, permuted_key_rows(problem), first_key, depth, kScalarKeys,
                         permuted);
      block.sync();
      block.each_thread([&](int thread) { add_products(queries, keys, permuted, thread, logits[thread]); });
      block.sync();
    }
    block.each_thread([&](int thread) {
      absorb_scalar_logits(logits[thread], scale, thread, problem.tokens - first_key, nodes, rows[thread]);
    });
  }
  merge_scalar_lanes(block, rows);

  Shared<float> results = block.template shared<float>(0, Pass::kResults * kScalarRows);
  Shared<double> parts = block.template shared<double>(kScalarResultBytes, kRecordFields * kReductionParts);
  block.each_thread([&](int thread) {
    if (thread % kLanes != 0) return;
    SWS_UNROLL
    for (int r = 0; r < kLaneRows; ++r) {
      float result[Pass::kResults];
      Pass::measure(rows[thread].row[r], scale, nodes, result);
      SWS_UNROLL
      for (int i = 0; i < Pass::kResults; ++i) {
        results.store(i * kScalarRows + thread / kLanes * kLaneRows + r, result[i], thread);
      }
    }
  });
  record_rows<Pass, kScalarRows>(block, results, parts, problem.query_tokens - first_row, record);
}

// Grid: x = any number of blocks, which share the row tiles, z = sample.
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_scalar(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                    int round, AlphaNodes nodes) {
  const int row_tiles = (problem.query_tokens + kScalarRows - 1) / kScalarRows;
  const int sample = block.z();
  for (int tile = block.x(); tile < row_tiles * problem.heads; tile += block.grid_x()) {
    measure_scalar_tile<Element, Pass>(block, problem, sample, tile / row_tiles, tile % row_tiles * kScalarRows, nodes,
                                       record_of(workspace, round, sample, tile));
  }
}

}  // namespace sws
