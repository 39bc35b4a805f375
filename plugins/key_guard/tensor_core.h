// The guard's passes on tensor cores, for float16 and bfloat16 with a head size that is a multiple of 8.
//
// A block processes 128 query rows of one head, a warp 32 of them. Tiles of 64 keys and of 64 permuted keys are copied
// to shared memory; for 32 keys at a time the warp computes both logit tiles (m16n8k16, float accumulation) and adds
// the pairs to the row sums, which each thread keeps for the columns that it holds. Logits stay in registers.
#pragma once

#include "key_guard/round.h"

namespace sws {

constexpr int kGuardThreads = 128;
constexpr int kRowTiles = 2;  // m16 tiles of a warp
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kGuardRows = kGuardThreads / 32 * kWarpRows;
constexpr int kGuardKeys = 64;  // keys of a shared-memory stage
constexpr int kStepKeys = 32;   // keys of one accumulation
constexpr int kKeyTiles = kStepKeys / 8;
constexpr int kThreadRows = 2 * kRowTiles;  // rows of which a thread holds results
constexpr int kThreadKeys = 2 * kKeyTiles;  // columns of each

SWS_HD int padded_head_size(int head_size) { return (head_size + 15) / 16 * 16; }

// Elements between two rows in shared memory: an odd multiple of 16 bytes, so ldmatrix has no bank conflict.
SWS_HD int head_stride(int head_size) { return padded_head_size(head_size) + 8; }

// Queries, then `stages` times keys and permuted keys. The reductions reuse the same memory.
SWS_HD int tensor_core_guard_bytes(int head_size, int stages) {
  return (kGuardRows + stages * 2 * kGuardKeys) * head_stride(head_size) * 2;
}

constexpr int kRowResultBytes = row_result_bytes<SurveyPass, kGuardRows>();
static_assert(kRowResultBytes + kPartBytes <= (kGuardRows + 2 * kGuardKeys) * 24 * 2 &&
                  kDigestBytes <= (kGuardRows + 2 * kGuardKeys) * 24 * 2,
              "the reductions fit into the memory of the smallest head size");

// Position of a thread in the result of m16n8k16: rows group and group + 8, columns 2 place and 2 place + 1.
struct LanePlace {
  int group;
  int place;
};

SWS_HD LanePlace lane_place(int thread) { return LanePlace{(thread % 32) / 4, thread % 4}; }

// Index among the block's 128 rows of a thread's result row r (0 .. kThreadRows - 1).
SWS_HD int result_row(int thread, int r) {
  return thread / 32 * kWarpRows + r / 2 * 16 + r % 2 * 8 + lane_place(thread).group;
}

constexpr int kRowLanes = 8;  // threads that copy one row

// Starts copying `rows` rows of one head into shared memory; rows past the last token and the padding become zeros.
template <typename Element, typename BlockType>
SWS_KERNEL_BODY void start_rows_copy(BlockType& block, GuardProblem const& problem, int sample, int head,
                                     TokenRows tensor, int first_token, int rows, Shared<Element> to) {
  const auto* elements = static_cast<const Element*>(tensor.data);
  const Element* first_row = elements + head_start(problem, tensor, sample, first_token, head);
  const int row_elements = problem.heads * problem.head_size;
  const int columns = padded_head_size(problem.head_size);
  const int stride = head_stride(problem.head_size);
  block.each_thread([&](int thread) {
    for (int row = thread / kRowLanes; row < rows; row += kGuardThreads / kRowLanes) {
      const bool exists = first_token + row < tensor.tokens;
      for (int column = thread % kRowLanes * 8; column < columns; column += kRowLanes * 8) {
        const bool valid = exists && column < problem.head_size;
        const Element* from = valid ? first_row + static_cast<int64_t>(row) * row_elements + column : elements;
        block.copy_16_bytes(to, row * stride + column, from, valid, thread);
      }
    }
  });
}

// q . k and q . kp for 32 rows and 32 keys of a warp; [row tile][key tile][register].
struct LogitPairs {
  float base[kRowTiles][kKeyTiles][4];
  float moved[kRowTiles][kKeyTiles][4];
};

struct QueryFragments {
  uint32_t tile[kRowTiles][4];
};

struct KeyFragments {
  uint32_t base[4];
  uint32_t moved[4];
};

// Products over 16 channels from `depth` on, for 32 keys from `first_key` on. kFirst: they become the logits, else they
// are added to them.
template <typename Element, bool kFirst, typename BlockType>
SWS_KERNEL_BODY void multiply_depth(BlockType& block, int stride, int first_key, int depth, Shared<Element> queries,
                                    Shared<Element> keys, Shared<Element> moved,
                                    PerThread<LogitPairs, kGuardThreads>& logits) {
  PerThread<QueryFragments, kGuardThreads> a;
  PerThread<KeyFragments, kGuardThreads> b;
  SWS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    // Matrices in order: rows 0-7, rows 8-15, then both again 8 columns on: the registers of an A fragment.
    auto row_index = [&](int thread) {
      const int lane = thread % 32;
      return (thread / 32 * kWarpRows + m * 16 + lane % 16) * stride + depth + lane / 16 * 8;
    };
    block.template load_matrices<false>(queries, row_index, [&](int t) { return a[t].tile[m]; });
  }
  SWS_UNROLL
  for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
    // Keys 0-7 at columns 0-7 and 8-15, then keys 8-15: the B fragments of two key tiles.
    auto row_index = [&](int thread) {
      const int lane = thread % 32;
      return (first_key + pair * 16 + lane / 16 * 8 + lane % 8) * stride + depth + lane / 8 % 2 * 8;
    };
    block.template load_matrices<false>(keys, row_index, [&](int t) { return b[t].base; });
    block.template load_matrices<false>(moved, row_index, [&](int t) { return b[t].moved; });
    SWS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      SWS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * pair + half;
        auto query = [&](int t) { return a[t].tile[m]; };
        auto base = [&](int t) { return logits[t].base[m][n]; };
        auto moved_base = [&](int t) { return logits[t].moved[m][n]; };
        auto key = [&](int t) { return b[t].base + 2 * half; };
        auto moved_key = [&](int t) { return b[t].moved + 2 * half; };
        if constexpr (kFirst) {
          block.template multiply<Element>(base, query, key);
          block.template multiply<Element>(moved_base, query, moved_key);
        } else {
          block.template multiply_add<Element>(base, query, key);
          block.template multiply_add<Element>(moved_base, query, moved_key);
        }
      }
    }
  }
}

template <typename Row>
struct ThreadRows {
  Row row[kThreadRows];
};

// Replaces the logits of keys from `keys_left` on, which do not exist, by logits without weight.
SWS_KERNEL_BODY void mask_logits(LogitPairs& logits, float scale, int place, int keys_left) {
  const float padded = kPaddedLogit / scale;
  SWS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    SWS_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      SWS_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + 2 * place + i % 2 < keys_left) continue;
        logits.base[m][n][i] = padded;
        logits.moved[m][n][i] = padded;
      }
    }
  }
}

// Adds a thread's logits to its rows.
template <typename Row>
SWS_KERNEL_BODY void absorb_logits(LogitPairs const& logits, float scale, AlphaNodes nodes, ThreadRows<Row>& rows) {
  SWS_UNROLL
  for (int r = 0; r < kThreadRows; ++r) {
    float base[kThreadKeys];
    float moved[kThreadKeys];
    SWS_UNROLL
    for (int i = 0; i < kThreadKeys; ++i) {
      base[i] = logits.base[r / 2][i / 2][r % 2 * 2 + i % 2];
      moved[i] = logits.moved[r / 2][i / 2][r % 2 * 2 + i % 2];
    }
    absorb(rows.row[r], base, moved, scale, nodes);
  }
}

// Merges the rows of the four threads that share them; each of the four gets the sum.
template <typename Row, typename BlockType>
SWS_KERNEL_BODY void merge_lanes(BlockType& block, AlphaNodes nodes, PerThread<ThreadRows<Row>, kGuardThreads>& rows) {
  SWS_UNROLL
  for (int mask = 1; mask <= 2; mask *= 2) {
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      PerThread<Row, kGuardThreads> theirs;
      SWS_UNROLL
      for (int f = 0; f < Row::kFields; ++f) {
        PerThread<float, kGuardThreads> values;
        block.each_thread([&](int thread) { values[thread] = rows[thread].row[r].field[f]; });
        block.shuffle_xor(values, mask);
        block.each_thread([&](int thread) { theirs[thread].field[f] = values[thread]; });
      }
      block.each_thread([&](int thread) { merge(rows[thread].row[r], theirs[thread], nodes); });
    }
  }
}

// Processes all keys for 128 rows of one head and writes their record.
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_row_tile(BlockType& block, GuardProblem const& problem, int sample, int head,
                                      int first_row, int stages, AlphaNodes nodes, double* record) {
  using Row = typename Pass::Row;
  const int stride = head_stride(problem.head_size);
  const int tiles = (problem.tokens + kGuardKeys - 1) / kGuardKeys;
  const int query_bytes = kGuardRows * stride * 2;
  const int key_bytes = kGuardKeys * stride * 2;
  Shared<Element> queries = block.template shared<Element>(0, kGuardRows * stride);
  auto keys_of = [&](int tile) {
    return block.template shared<Element>(query_bytes + tile % stages * 2 * key_bytes, kGuardKeys * stride);
  };
  auto moved_of = [&](int tile) {
    return block.template shared<Element>(query_bytes + (tile % stages * 2 + 1) * key_bytes, kGuardKeys * stride);
  };
  auto start_tile = [&](int tile) {
    if (tile >= tiles) return;
    const int token = tile * kGuardKeys;
    start_rows_copy<Element>(block, problem, sample, head, key_rows(problem), token, kGuardKeys, keys_of(tile));
    start_rows_copy<Element>(block, problem, sample, head, moved_key_rows(problem), token, kGuardKeys, moved_of(tile));
  };

  PerThread<ThreadRows<Row>, kGuardThreads> rows;
  block.each_thread([&](int thread) {
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) clear_row(rows[thread].row[r]);
  });
  const float scale = logit_scale(problem, sample);
  PerThread<LogitPairs, kGuardThreads> logits;

  start_rows_copy<Element>(block, problem, sample, head, query_rows(problem), first_row, kGuardRows, queries);
  start_tile(0);
  block.commit_copies();
  for (int tile = 0; tile < tiles; ++tile) {
    if (stages == 2) {
      start_tile(tile + 1);
      block.commit_copies();
      block.template wait_copies<1>();
    } else {
      block.template wait_copies<0>();
    }
    block.sync();
    for (int step = 0; step < kGuardKeys; step += kStepKeys) {
      multiply_depth<Element, true>(block, stride, step, 0, queries, keys_of(tile), moved_of(tile), logits);
      for (int depth = 16; depth < padded_head_size(problem.head_size); depth += 16) {
        multiply_depth<Element, false>(block, stride, step, depth, queries, keys_of(tile), moved_of(tile), logits);
      }
      const int keys_left = problem.tokens - tile * kGuardKeys - step;
      if (keys_left < kStepKeys) {
        block.each_thread([&](int t) { mask_logits(logits[t], scale, lane_place(t).place, keys_left); });
      }
      block.each_thread([&](int thread) { absorb_logits(logits[thread], scale, nodes, rows[thread]); });
    }
    block.sync();
    if (stages == 1) {
      start_tile(tile + 1);
      block.commit_copies();
    }
  }
  merge_lanes(block, nodes, rows);
  Shared<float> results = block.template shared<float>(0, Pass::kResults * kGuardRows);
  Shared<double> parts = block.template shared<double>(kRowResultBytes, kRecordFields * kReductionParts);
  block.each_thread([&](int thread) {
    if (lane_place(thread).place != 0) return;
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      float result[Pass::kResults];
      Pass::measure(rows[thread].row[r], nodes, result);
      SWS_UNROLL
      for (int i = 0; i < Pass::kResults; ++i) {
        results.store(i * kGuardRows + result_row(thread, r), result[i], thread);
      }
    }
  });
  record_rows<Pass, kGuardRows>(block, results, parts, problem.query_tokens - first_row, record);
}

// Grid: x = any number of blocks, which share the row tiles, z = sample. Shared memory:
// tensor_core_guard_bytes(head_size, stages).
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_tensor_core(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                         int stages, int round, AlphaNodes nodes) {
  const int row_tiles = (problem.query_tokens + kGuardRows - 1) / kGuardRows;
  const int sample = block.z();
  for (int tile = block.x(); tile < row_tiles * problem.heads; tile += block.grid_x()) {
    measure_row_tile<Element, Pass>(block, problem, sample, tile / row_tiles, tile % row_tiles * kGuardRows, stages,
                                    nodes, record_of(workspace, round, sample, tile));
  }
}

}  // namespace sws
