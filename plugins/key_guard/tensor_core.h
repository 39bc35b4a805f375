// The guard's passes on tensor cores, for float16 and bfloat16 with a head size that is a multiple of 8.
//
// A block processes 128 or 64 query rows of one head, a warp 32 of them. Tiles of 64 keys and of 64 permuted keys are
// copied to shared memory; for 32 keys at a time the warp computes both logit tiles (m16n8k16, float accumulation) and
// adds the pairs to the row sums, which each thread keeps for the columns that it holds. Logits stay in registers. With
// 128 rows each warp processes all keys; with 64 rows, for problems with few rows, two warps share the keys of a row.
#pragma once

#include <type_traits>

#include "key_guard/round.h"

namespace sws {

constexpr int kGuardThreads = 128;
constexpr int kRowTiles = 2;  // m16 tiles of a warp
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kGuardWarps = kGuardThreads / 32;
constexpr int kMostGuardRows = kGuardWarps * kWarpRows;
constexpr int kGuardKeys = 64;  // keys of a shared-memory stage
constexpr int kStepKeys = 32;   // keys of one accumulation
constexpr int kKeyTiles = kStepKeys / 8;
constexpr int kThreadRows = 2 * kRowTiles;  // rows of which a thread holds results
constexpr int kThreadKeys = 2 * kKeyTiles;  // columns of each

SWS_HD int padded_head_size(int head_size) { return (head_size + 15) / 16 * 16; }

// Elements between two rows in shared memory: an odd multiple of 16 bytes, so ldmatrix has no bank conflict.
SWS_HD int head_stride(int head_size) { return padded_head_size(head_size) + 8; }

// How a block divides its work.
struct GuardTiling {
  int row_warps;  // warps with different rows, 4 or 2; the others process other keys of the same rows
  int stages;     // tiles of keys in shared memory

  SWS_HD int rows() const { return row_warps * kWarpRows; }
  SWS_HD int key_warps() const { return row_warps == kGuardWarps ? 1 : 2; }
  // The warp's position among those with the same rows.
  SWS_HD int key_warp(int thread) const { return row_warps == kGuardWarps ? 0 : thread / 64; }
};

// Queries, then for each stage keys and permuted keys. The reductions reuse the same memory.
SWS_HD int tensor_core_guard_bytes(int head_size, GuardTiling tiling) {
  return (tiling.rows() + tiling.stages * 2 * kGuardKeys) * head_stride(head_size) * 2;
}

constexpr int kFewestGuardRows = 2 * kWarpRows;
constexpr int kRowResultBytes = row_result_bytes<SurveyPass, kMostGuardRows>();
constexpr int kExchangeBytes = kFewestGuardRows * CandidatePass::Row::kFields * static_cast<int>(sizeof(float));
static_assert(kRowResultBytes + kPartBytes + kExchangeBytes <= (kFewestGuardRows + 2 * kGuardKeys) * 24 * 2 &&
                  kDigestBytes <= (kFewestGuardRows + 2 * kGuardKeys) * 24 * 2,
              "the reductions fit into the memory of the smallest head size");

// Position of a thread in the result of m16n8k16: rows group and group + 8, columns 2 place and 2 place + 1.
struct LanePlace {
  int group;
  int place;
};

SWS_HD LanePlace lane_place(int thread) { return LanePlace{(thread % 32) / 4, thread % 4}; }

// The first of the 32 rows of a thread's warp, among the rows of the block.
SWS_HD int warp_row(int thread, GuardTiling tiling) { return (thread / 32 & (tiling.row_warps - 1)) * kWarpRows; }

// Index among the block's rows of a thread's result row r (0 .. kThreadRows - 1).
SWS_HD int result_row(int thread, GuardTiling tiling, int r) {
  return warp_row(thread, tiling) + r / 2 * 16 + r % 2 * 8 + lane_place(thread).group;
}

constexpr int kCopyRows = 64;  // rows that are copied at a time
constexpr int kRowLanes = 8;   // threads that copy one row
constexpr int kCopyRowStep = kGuardThreads / kRowLanes;

// Starts copying 64 rows of one head into shared memory, from `first_row` on, of which `rows_left` exist; the others
// become zeros.
template <typename Element, typename BlockType>
SWS_KERNEL_BODY void start_rows_copy(BlockType& block, GuardProblem const& problem, const Element* first_row,
                                     int rows_left, Shared<Element> to, int to_row) {
  const int row_elements = problem.heads * problem.head_size;
  const int stride = head_stride(problem.head_size);
  block.each_thread([&](int thread) {
    const int row = thread / kRowLanes;
    for (int column = thread % kRowLanes * 8; column < problem.head_size; column += kRowLanes * 8) {
      const Element* from = first_row + static_cast<int64_t>(row) * row_elements + column;
      int index = (to_row + row) * stride + column;
      SWS_UNROLL
      for (int step = 0; step < kCopyRows; step += kCopyRowStep) {
        block.copy_16_bytes(to, index, from, row + step < rows_left, thread);
        from += static_cast<int64_t>(kCopyRowStep) * row_elements;
        index += kCopyRowStep * stride;
      }
    }
  });
}

// Clears the columns that pad the head size to a multiple of 16, in all rows of the block's shared memory.
template <typename Element, typename BlockType>
SWS_KERNEL_BODY void clear_padding(BlockType& block, int head_size, int rows) {
  if (head_size == padded_head_size(head_size)) return;
  const int stride = head_stride(head_size);
  Shared<Element> all = block.template shared<Element>(0, rows * stride);
  block.each_thread([&](int thread) {
    for (int row = thread; row < rows; row += kGuardThreads) {
      for (int column = head_size; column < padded_head_size(head_size); ++column) {
        all.store(row * stride + column, Element{}, thread);
      }
    }
  });
}

// q . k and q . kp for 32 rows and 32 keys of a warp; [row tile][key tile][register].
struct LogitPairs {
  float base[kRowTiles][kKeyTiles][4];
  float permuted[kRowTiles][kKeyTiles][4];
};

struct QueryFragments {
  uint32_t tile[kRowTiles][4];
};

struct KeyFragments {
  uint32_t base[4];
  uint32_t permuted[4];
};

// Products over 16 channels from `depth` on, for the 32 keys from first_key_of(thread) on. kFirst: they
// become the logits, else they are added to them.
template <typename Element, bool kFirst, typename BlockType, typename FirstKey>
SWS_KERNEL_BODY void multiply_depth(BlockType& block, int stride, GuardTiling tiling, FirstKey first_key_of, int depth,
                                    Shared<Element> queries, Shared<Element> keys, Shared<Element> permuted,
                                    PerThread<LogitPairs, kGuardThreads>& logits) {
  PerThread<QueryFragments, kGuardThreads> a;
  PerThread<KeyFragments, kGuardThreads> b;
  SWS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    // Matrices in order: rows 0-7, rows 8-15, then both again 8 columns on: the registers of an A fragment.
    auto row_index = [&](int thread) {
      const int lane = thread % 32;
      return (warp_row(thread, tiling) + m * 16 + lane % 16) * stride + depth + lane / 16 * 8;
    };
    block.template load_matrices<false>(queries, row_index, [&](int t) { return a[t].tile[m]; });
  }
  SWS_UNROLL
  for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
    // Keys 0-7 at columns 0-7 and 8-15, then keys 8-15: the B fragments of two key tiles.
    auto row_index = [&](int thread) {
      const int lane = thread % 32;
      return (first_key_of(thread) + pair * 16 + lane / 16 * 8 + lane % 8) * stride + depth + lane / 8 % 2 * 8;
    };
    block.template load_matrices<false>(keys, row_index, [&](int t) { return b[t].base; });
    block.template load_matrices<false>(permuted, row_index, [&](int t) { return b[t].permuted; });
    SWS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      SWS_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * pair + half;
        auto query = [&](int t) { return a[t].tile[m]; };
        auto base = [&](int t) { return logits[t].base[m][n]; };
        auto permuted_base = [&](int t) { return logits[t].permuted[m][n]; };
        auto key = [&](int t) { return b[t].base + 2 * half; };
        auto permuted_key = [&](int t) { return b[t].permuted + 2 * half; };
        if constexpr (kFirst) {
          block.template multiply<Element>(base, query, key);
          block.template multiply<Element>(permuted_base, query, permuted_key);
        } else {
          block.template multiply_add<Element>(base, query, key);
          block.template multiply_add<Element>(permuted_base, query, permuted_key);
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
        logits.permuted[m][n][i] = padded;
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
    float permuted[kThreadKeys];
    SWS_UNROLL
    for (int i = 0; i < kThreadKeys; ++i) {
      base[i] = logits.base[r / 2][i / 2][r % 2 * 2 + i % 2];
      permuted[i] = logits.permuted[r / 2][i / 2][r % 2 * 2 + i % 2];
    }
    absorb(rows.row[r], base, permuted, scale, nodes);
  }
}

// Merges the rows of the four threads that share them; each of the four gets the sum.
template <typename Row, typename BlockType>
SWS_KERNEL_BODY void merge_lanes(BlockType& block, PerThread<ThreadRows<Row>, kGuardThreads>& rows) {
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
      block.each_thread([&](int thread) { merge(rows[thread].row[r], theirs[thread]); });
    }
  }
}

// Merges the rows of two warps that processed different keys of the same rows, into the first of them.
template <typename Row, typename BlockType>
SWS_KERNEL_BODY void merge_warps(BlockType& block, GuardTiling tiling,
                                 PerThread<ThreadRows<Row>, kGuardThreads>& rows) {
  if (tiling.key_warps() == 1) return;
  Shared<float> exchange = block.template shared<float>(kRowResultBytes + kPartBytes, kFewestGuardRows * Row::kFields);
  block.each_thread([&](int thread) {
    if (lane_place(thread).place != 0 || tiling.key_warp(thread) == 0) return;
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      SWS_UNROLL
      for (int f = 0; f < Row::kFields; ++f) {
        exchange.store(f * kFewestGuardRows + result_row(thread, tiling, r), rows[thread].row[r].field[f], thread);
      }
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
    if (lane_place(thread).place != 0 || tiling.key_warp(thread) != 0) return;
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      Row theirs;
      SWS_UNROLL
      for (int f = 0; f < Row::kFields; ++f) {
        theirs.field[f] = exchange.load(f * kFewestGuardRows + result_row(thread, tiling, r), thread);
      }
      merge(rows[thread].row[r], theirs);
    }
  });
}

// Processes all keys for the rows of one tile of one head and writes their record.
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_row_tile(BlockType& block, GuardProblem const& problem, int sample, int head,
                                      int first_row, GuardTiling tiling, AlphaNodes nodes, double* record) {
  using Row = typename Pass::Row;
  const int stride = head_stride(problem.head_size);
  const int tiles = (problem.tokens + kGuardKeys - 1) / kGuardKeys;
  const int query_bytes = tiling.rows() * stride * 2;
  const int key_bytes = kGuardKeys * stride * 2;
  Shared<Element> queries = block.template shared<Element>(0, tiling.rows() * stride);
  auto stage_of = [&](int tile) { return tiling.stages == 2 ? tile % 2 : 0; };
  auto keys_of = [&](int tile) {
    return block.template shared<Element>(query_bytes + stage_of(tile) * 2 * key_bytes, kGuardKeys * stride);
  };
  auto moved_of = [&](int tile) {
    return block.template shared<Element>(query_bytes + (stage_of(tile) * 2 + 1) * key_bytes, kGuardKeys * stride);
  };
  auto rows_of = [&](TokenRows tensor, int token) {
    return static_cast<const Element*>(tensor.data) + head_start(problem, tensor, sample, token, head);
  };
  auto start_tile = [&](int tile) {
    if (tile >= tiles) return;
    const int token = tile * kGuardKeys;
    const int left = problem.tokens - token;
    start_rows_copy(block, problem, rows_of(key_rows(problem), token), left, keys_of(tile), 0);
    start_rows_copy(block, problem, rows_of(permuted_key_rows(problem), token), left, moved_of(tile), 0);
  };

  PerThread<ThreadRows<Row>, kGuardThreads> rows;
  block.each_thread([&](int thread) {
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) clear_row(rows[thread].row[r]);
  });
  const float scale = logit_scale(problem, sample);
  PerThread<LogitPairs, kGuardThreads> logits;
  auto absorb_tile = [&](int tile, auto masked) {
    for (int step = 0; step < kGuardKeys; step += kStepKeys * tiling.key_warps()) {
      auto first_key = [&](int thread) { return step + tiling.key_warp(thread) * kStepKeys; };
      multiply_depth<Element, true>(block, stride, tiling, first_key, 0, queries, keys_of(tile), moved_of(tile),
                                    logits);
      for (int depth = 16; depth < padded_head_size(problem.head_size); depth += 16) {
        multiply_depth<Element, false>(block, stride, tiling, first_key, depth, queries, keys_of(tile), moved_of(tile),
                                       logits);
      }
      block.each_thread([&](int thread) {
        if constexpr (decltype(masked)::value) {
          const int keys_left = problem.tokens - tile * kGuardKeys - first_key(thread);
          mask_logits(logits[thread], scale, lane_place(thread).place, keys_left);
        }
        absorb_logits(logits[thread], scale, nodes, rows[thread]);
      });
    }
  };

  clear_padding<Element>(block, problem.head_size, tiling.rows() + tiling.stages * 2 * kGuardKeys);
  for (int row = 0; row < tiling.rows(); row += kCopyRows) {
    const int token = first_row + row;
    start_rows_copy(block, problem, rows_of(query_rows(problem), token), problem.query_tokens - token, queries, row);
  }
  start_tile(0);
  block.commit_copies();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tiling.stages == 2) {
      start_tile(tile + 1);
      block.commit_copies();
      block.template wait_copies<1>();
    } else {
      block.template wait_copies<0>();
    }
    block.sync();
    // Two copies of the loop: in one, selecting between logit and padding would cost a tenth of its instructions.
    if ((tile + 1) * kGuardKeys <= problem.tokens) {
      absorb_tile(tile, std::false_type{});
    } else {
      absorb_tile(tile, std::true_type{});
    }
    block.sync();
    if (tiling.stages == 1) {
      start_tile(tile + 1);
      block.commit_copies();
    }
  }
  merge_lanes(block, rows);
  merge_warps(block, tiling, rows);
  Shared<float> results = block.template shared<float>(0, Pass::kResults * kMostGuardRows);
  Shared<double> parts = block.template shared<double>(kRowResultBytes, kRecordFields * kReductionParts);
  block.each_thread([&](int thread) {
    if (lane_place(thread).place != 0 || tiling.key_warp(thread) != 0) return;
    SWS_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      float result[Pass::kResults];
      Pass::measure(rows[thread].row[r], scale, nodes, result);
      SWS_UNROLL
      for (int i = 0; i < Pass::kResults; ++i) {
        results.store(i * kMostGuardRows + result_row(thread, tiling, r), result[i], thread);
      }
    }
  });
  const int rows_left = problem.query_tokens - first_row;
  record_rows<Pass, kMostGuardRows>(block, results, parts, rows_left < tiling.rows() ? rows_left : tiling.rows(),
                                    record);
}

// Grid: x = any number of blocks, which share the row tiles, z = sample. Shared memory:
// tensor_core_guard_bytes(head_size, tiling).
template <typename Element, typename Pass, typename BlockType>
SWS_KERNEL_BODY void measure_tensor_core(BlockType& block, GuardProblem const& problem, GuardWorkspace const& workspace,
                                         GuardTiling tiling, int round, AlphaNodes nodes) {
  const int row_tiles = (problem.query_tokens + tiling.rows() - 1) / tiling.rows();
  const int sample = block.z();
  for (int tile = block.x(); tile < row_tiles * problem.heads; tile += block.grid_x()) {
    measure_row_tile<Element, Pass>(block, problem, sample, tile / row_tiles, tile % row_tiles * tiling.rows(), tiling,
                                    nodes, record_of(workspace, round, sample, tile));
  }
}

}  // namespace sws
