// Reductions of row results to records and of records to totals. Every sum has a fixed order.
#pragma once

#include "common/block.h"
#include "key_guard/passes.h"

namespace sws {

// Number of partial sums of a result, each over a part of the rows or records.
constexpr int kReductionParts = 8;

// Shared memory of a reduction over kRows rows: results of the rows as floats, then the partial sums as doubles.
template <typename Pass, int kRows>
constexpr int row_result_bytes() {
  return Pass::kResults * kRows * static_cast<int>(sizeof(float));
}

constexpr int kPartBytes = kRecordFields * kReductionParts * static_cast<int>(sizeof(double));

// Combines the partial sums of each result and calls `take(result, value, thread)` on the thread of that number.
template <typename Pass, typename BlockType, typename Take>
SWS_KERNEL_BODY void fold_parts(BlockType& block, Shared<double> parts, Take take) {
  block.sync();
  block.each_thread([&](int thread) {
    if (thread >= Pass::kResults) return;
    double value = neutral(Pass::how(thread));
    for (int part = 0; part < kReductionParts; ++part) {
      value = combine(Pass::how(thread), value, parts.load(thread * kReductionParts + part, thread));
    }
    take(thread, value, thread);
  });
}

// Writes the record of a row tile. `rows` holds result r of row i at r * kRows + i; rows past the last token are
// skipped.
template <typename Pass, int kRows, typename BlockType>
SWS_KERNEL_BODY void record_rows(BlockType& block, Shared<float> rows, Shared<double> parts, int valid_rows,
                                 double* record) {
  constexpr int kRowsPerPart = kRows / kReductionParts;
  static_assert(Pass::kResults * kReductionParts <= BlockType::kThreads, "one thread for each part of each result");
  block.sync();
  block.each_thread([&](int thread) {
    const int result = thread / kReductionParts;
    const int part = thread % kReductionParts;
    if (result >= Pass::kResults) return;
    double value = neutral(Pass::how(result));
    for (int i = part * kRowsPerPart; i < (part + 1) * kRowsPerPart && i < valid_rows; ++i) {
      value = combine(Pass::how(result), value, static_cast<double>(rows.load(result * kRows + i, thread)));
    }
    parts.store(thread, value, thread);
  });
  fold_parts<Pass>(block, parts, [&](int result, double value, int) { record[result] = value; });
  block.sync();
}

// Totals of all records of a sample in one round, into totals[0 .. kResults).
template <typename Pass, typename BlockType>
SWS_KERNEL_BODY void total_records(BlockType& block, GuardWorkspace const& workspace, int round, int sample,
                                   int records, Shared<double> parts, Shared<double> totals) {
  block.each_thread([&](int thread) {
    const int result = thread / kReductionParts;
    if (result >= Pass::kResults) return;
    double value = neutral(Pass::how(result));
    for (int tile = thread % kReductionParts; tile < records; tile += kReductionParts) {
      value = combine(Pass::how(result), value, record_of(workspace, round, sample, tile)[result]);
    }
    parts.store(thread, value, thread);
  });
  fold_parts<Pass>(block, parts, [&](int result, double value, int thread) { totals.store(result, value, thread); });
  block.sync();
}

}  // namespace sws
