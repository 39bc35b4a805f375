#include "emulator_case.h"

#include <stdexcept>

#include "emulated_block.h"

namespace sws {
namespace {

constexpr int kThreads = 32;
using SmallBlock = Block<kThreads>;

void write_all(SmallBlock& block, Shared<float> values) {
  block.each_thread([&](int thread) { values.store(thread, static_cast<float>(thread), thread); });
}

void read_neighbours(SmallBlock& block, Shared<float> values) {
  block.each_thread([&](int thread) { values.load(thread ^ 1, thread); });
}

void run_fault(SmallBlock& block, const std::string& fault) {
  Shared<float> values = block.shared<float>(0, kThreads);
  alignas(16) static const float source[4] = {1, 2, 3, 4};
  if (fault == "none") {
    write_all(block, values);
    block.sync();
    read_neighbours(block, values);
    block.sync();
    write_all(block, values);
  } else if (fault == "read after write") {
    write_all(block, values);
    read_neighbours(block, values);
  } else if (fault == "write after read") {
    write_all(block, values);
    block.sync();
    read_neighbours(block, values);
    write_all(block, values);
  } else if (fault == "write after write") {
    block.each_thread([&](int thread) { values.store(0, 1.0f, thread); });
  } else if (fault == "copy in flight") {
    block.each_thread([&](int thread) {
      if (thread == 0) block.copy_16_bytes(values, 0, source, true, thread);
    });
    block.commit_copies();
    block.sync();
    block.each_thread([&](int thread) { values.load(0, thread); });
  } else if (fault == "copy not published") {
    block.each_thread([&](int thread) {
      if (thread == 0) block.copy_16_bytes(values, 0, source, true, thread);
    });
    block.commit_copies();
    block.wait_copies<0>();
    block.each_thread([&](int thread) { values.load(0, thread); });
  } else if (fault == "beyond the array") {
    block.each_thread([&](int thread) { values.store(thread + 1, 0.0f, thread); });
  } else if (fault == "misaligned pair") {
    alignas(4) Float16 target[4] = {};
    block.store_pair(target + 1, 0);
  } else if (fault == "beyond shared memory") {
    block.shared<float>(0, kThreads + 1);
  } else {
    throw std::runtime_error("unknown fault");
  }
}

}  // namespace

void run_emulator_case(const Case& test) {
  std::string fault = test.text("fault");
  for (char& letter : fault) letter = letter == '_' ? ' ' : letter;
  run_grid<kThreads>(1, 1, 1, kThreads * static_cast<int>(sizeof(float)), false,
                     [&](auto& block) { run_fault(block, fault); });
}

}  // namespace sws
