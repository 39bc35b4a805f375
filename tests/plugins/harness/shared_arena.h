// Shared memory of an emulated thread block, with the checks that hardware does not make.
//
// Threads are emulated one after the other, so a missing barrier would go unseen. Hence every two bytes remember
// who touched them since the last barrier; a thread that reads what another one wrote, or writes what another one
// read or wrote, without a barrier in between, is a race and stops the run. So is touching a copy still in flight.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sws {

class SharedArena {
 public:
  // A reader or writer that is the whole warp: it races with every thread.
  static constexpr int kAnyThread = -2;

  explicit SharedArena(int bytes) : bytes_(static_cast<size_t>(bytes), 0xFF), cells_((bytes_.size() + 1) / 2) {}

  template <typename T>
  T load(size_t offset, int thread) {
    note_read(offset, sizeof(T), thread);
    T value;
    std::memcpy(&value, bytes_.data() + offset, sizeof(T));
    return value;
  }

  void write(size_t offset, const void* data, size_t size, int thread) {
    note_write(offset, size, thread);
    std::memcpy(bytes_.data() + offset, data, size);
  }

  // The memory an asynchronous copy will write belongs to nobody until the copy is waited for.
  void begin_copy(size_t offset, size_t size, int thread) {
    note_write(offset, size, thread);
    set_in_flight(offset, size, true);
    std::memset(bytes_.data() + offset, 0xFF, size);
  }

  void end_copy(size_t offset, const void* data, size_t size, int thread) {
    set_in_flight(offset, size, false);
    write(offset, data, size, thread);
  }

  void barrier() { ++epoch_; }

 private:
  struct Cell {
    int writer = -1;
    int reader = -1;
    uint64_t write_epoch = 0;
    uint64_t read_epoch = 0;
    bool in_flight = false;
  };

  void note_read(size_t offset, size_t size, int thread) {
    for (Cell* cell = first(offset, size); cell != last(offset, size); ++cell) {
      if (cell->in_flight) fail("a copy in flight is read", offset, thread, cell->writer);
      if (cell->write_epoch == epoch_ && cell->writer != thread) {
        fail("read without a barrier after another thread's write", offset, thread, cell->writer);
      }
      const bool shared = cell->read_epoch == epoch_ && cell->reader != thread;
      cell->reader = shared ? kAnyThread : thread;
      cell->read_epoch = epoch_;
    }
  }

  void note_write(size_t offset, size_t size, int thread) {
    for (Cell* cell = first(offset, size); cell != last(offset, size); ++cell) {
      if (cell->in_flight) fail("a copy in flight is overwritten", offset, thread, cell->writer);
      if (cell->write_epoch == epoch_ && cell->writer != thread) {
        fail("two threads write without a barrier in between", offset, thread, cell->writer);
      }
      if (cell->read_epoch == epoch_ && cell->reader != thread) {
        fail("written without a barrier after another thread's read", offset, thread, cell->reader);
      }
      cell->writer = thread;
      cell->write_epoch = epoch_;
    }
  }

  void set_in_flight(size_t offset, size_t size, bool value) {
    for (Cell* cell = first(offset, size); cell != last(offset, size); ++cell) cell->in_flight = value;
  }

  Cell* first(size_t offset, size_t size) {
    if (offset + size > bytes_.size()) fail("access beyond the block's shared memory", offset, -1, -1);
    return cells_.data() + offset / 2;
  }

  Cell* last(size_t offset, size_t size) { return cells_.data() + (offset + size + 1) / 2; }

  [[noreturn]] void fail(const char* what, size_t offset, int thread, int other) const {
    throw std::runtime_error("shared memory, byte " + std::to_string(offset) + ": " + what + " (thread " +
                             std::to_string(thread) + ", other " + std::to_string(other) + ")");
  }

  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  uint64_t epoch_ = 1;
};

}  // namespace sws
