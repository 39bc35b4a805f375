// plugins/common/block.h on a CPU: the same interface, with the threads of a block run sequentially.
//
// The warp-wide instructions follow the register layouts in the PTX ISA manual (sections on mma.m16n8k16, ldmatrix and
// shfl), not those of the kernels, so a kernel with a wrong layout gives wrong results.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/number_formats.h"
#include "common/platform.h"
#include "shared_arena.h"

namespace sws {

template <typename T, int kThreads>
class PerThread {
 public:
  PerThread() : values_(kThreads) {}
  T& operator[](int thread) { return values_.at(static_cast<size_t>(thread)); }

 private:
  std::vector<T> values_;
};

template <typename T>
class Shared {
 public:
  Shared(SharedArena* arena, int byte_offset, int count) : arena_(arena), offset_(byte_offset), count_(count) {}
  T load(int index, int thread) const { return arena_->load<T>(byte_of(index, 1), thread); }
  void store(int index, T value, int thread) const { arena_->write(byte_of(index, 1), &value, sizeof(T), thread); }
  SharedArena* arena() const { return arena_; }

  size_t byte_of(int index, int elements) const {
    if (index < 0 || index + elements > count_) {
      throw std::runtime_error("shared array of " + std::to_string(count_) + " elements: index " +
                               std::to_string(index));
    }
    return static_cast<size_t>(offset_) + static_cast<size_t>(index) * sizeof(T);
  }

 private:
  SharedArena* arena_;
  int offset_;
  int count_;
};

struct BlockIndex {
  int x = 0;
  int y = 0;
  int z = 0;
  int grid_x = 1;
};

template <int kThreadCount>
class Block {
 public:
  static constexpr int kThreads = kThreadCount;

  // `reversed` runs the threads from the last to the first: a result that depends on it is a race.
  Block(BlockIndex index, int shared_bytes, bool reversed)
      : index_(index), shared_bytes_(shared_bytes), reversed_(reversed), arena_(shared_bytes) {}

  int x() const { return index_.x; }
  int y() const { return index_.y; }
  int z() const { return index_.z; }
  int grid_x() const { return index_.grid_x; }

  template <typename T>
  Shared<T> shared(int byte_offset, int count) {
    if (byte_offset % 16 != 0) throw std::runtime_error("shared array is not aligned to 16 bytes");
    if (byte_offset + count * static_cast<int>(sizeof(T)) > shared_bytes_) {
      throw std::runtime_error("shared array ends beyond the " + std::to_string(shared_bytes_) + " bytes asked for");
    }
    return Shared<T>(&arena_, byte_offset, count);
  }

  template <typename Work>
  void each_thread(Work work) {
    for (int i = 0; i < kThreads; ++i) work(reversed_ ? kThreads - 1 - i : i);
  }

  void sync() { arena_.barrier(); }

  void shuffle_xor(PerThread<float, kThreads>& values, int mask) {
    PerThread<float, kThreads> before = values;
    for (int thread = 0; thread < kThreads; ++thread) values[thread] = before[thread ^ mask];
  }

  template <typename Element>
  void copy_16_bytes(Shared<Element> to, int index, const Element* from, bool valid, int thread) {
    start_copy(16, to.byte_of(index, 16 / static_cast<int>(sizeof(Element))), from, valid, thread);
  }

  void copy_4_bytes(Shared<float> to, int index, const float* from, bool valid, int thread) {
    start_copy(4, to.byte_of(index, 1), from, valid, thread);
  }

  void commit_copies() {
    groups_.push_back(open_group_);
    open_group_.clear();
  }

  template <int kPending>
  void wait_copies() {
    while (groups_.size() > static_cast<size_t>(kPending)) {
      for (const Copy& copy : groups_.front()) arena_.end_copy(copy.offset, copy.data, copy.size, copy.thread);
      groups_.pop_front();
    }
  }

  template <bool kTransposed, typename Element, typename RowIndex, typename Registers>
  void load_matrices(Shared<Element> from, RowIndex row_index, Registers registers) {
    static_assert(sizeof(Element) == 2, "ldmatrix moves 16-bit elements");
    for (int warp = 0; warp < kThreads; warp += 32) {
      uint16_t matrix[4][8][8];
      for (int lane = 0; lane < 32; ++lane) {
        const size_t start = from.byte_of(row_index(warp + lane), 8);
        if (start % 16 != 0) throw std::runtime_error("ldmatrix row is not aligned to 16 bytes");
        for (int column = 0; column < 8; ++column) {
          matrix[lane / 8][lane % 8][column] =
              from.arena()->template load<uint16_t>(start + 2 * static_cast<size_t>(column), SharedArena::kAnyThread);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int major = lane / 4;
        const int minor = 2 * (lane % 4);
        for (int m = 0; m < 4; ++m) {
          const uint32_t low = kTransposed ? matrix[m][minor][major] : matrix[m][major][minor];
          const uint32_t high = kTransposed ? matrix[m][minor + 1][major] : matrix[m][major][minor + 1];
          registers(warp + lane)[m] = low | (high << 16);
        }
      }
    }
  }

  template <typename Element>
  void store_pair(Element* to, uint32_t pair) {
    static_assert(sizeof(Element) == 2, "a pair has 32 bits");
    if (reinterpret_cast<uintptr_t>(to) % sizeof(pair) != 0)
      throw std::runtime_error("store_pair to a misaligned address");
    std::memcpy(static_cast<void*>(to), &pair, sizeof(pair));
  }

  template <typename Element, typename RegistersD, typename RegistersA, typename RegistersB>
  void multiply_add(RegistersD d_of, RegistersA a_of, RegistersB b_of) {
    multiply_fragments<Element>(d_of, a_of, b_of, [&](int thread, int i) { return d_of(thread)[i]; });
  }

  template <typename Element, typename RegistersD, typename RegistersA, typename RegistersB>
  void multiply(RegistersD d_of, RegistersA a_of, RegistersB b_of) {
    multiply_fragments<Element>(d_of, a_of, b_of, [](int, int) { return 0.0f; });
  }

 private:
  template <typename Element, typename RegistersD, typename RegistersA, typename RegistersB, typename Addend>
  void multiply_fragments(RegistersD d_of, RegistersA a_of, RegistersB b_of, Addend addend) {
    for (int warp = 0; warp < kThreads; warp += 32) {
      float a[16][16];
      float b[8][16];  // transposed
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4;
        const int in_group = lane % 4;
        for (int i = 0; i < 8; ++i) {
          const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
          const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
          a[row][column] = half_of<Element>(a_of(warp + lane)[i / 2], i % 2);
        }
        for (int i = 0; i < 4; ++i) {
          const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
          b[group][row] = half_of<Element>(b_of(warp + lane)[i / 2], i % 2);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 4 + (i >= 2 ? 8 : 0);
          const int column = (lane % 4) * 2 + (i & 1);
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
          d_of(warp + lane)[i] = addend(warp + lane, i) + sum;
        }
      }
    }
  }

  void start_copy(size_t size, size_t offset, const void* from, bool valid, int thread) {
    const std::string what = std::to_string(size) + "-byte copy ";
    if (offset % size != 0) throw std::runtime_error(what + "to a misaligned shared address");
    if (reinterpret_cast<uintptr_t>(from) % size != 0) throw std::runtime_error(what + "from a misaligned address");
    Copy copy;
    copy.offset = offset;
    copy.size = size;
    copy.thread = thread;
    if (valid) std::memcpy(copy.data, from, size);
    arena_.begin_copy(offset, size, thread);
    open_group_.push_back(copy);
  }

  struct Copy {
    size_t offset = 0;
    size_t size = 0;
    int thread = 0;
    unsigned char data[16] = {};
  };

  template <typename Element>
  static float half_of(uint32_t packed, int half) {
    return to_float(Element{static_cast<uint16_t>(half == 0 ? packed & 0xFFFFu : packed >> 16)});
  }

  BlockIndex index_;
  int shared_bytes_;
  bool reversed_;
  SharedArena arena_;
  std::vector<Copy> open_group_;
  std::deque<std::vector<Copy>> groups_;
};

// Runs a kernel body over a grid: body(block) for every block, x fastest.
template <int kThreads, typename Body>
void run_grid(int grid_x, int grid_y, int grid_z, int shared_bytes, bool reversed, Body body) {
  for (int z = 0; z < grid_z; ++z) {
    for (int y = 0; y < grid_y; ++y) {
      for (int x = 0; x < grid_x; ++x) {
        Block<kThreads> block(BlockIndex{x, y, z, grid_x}, shared_bytes, reversed);
        body(block);
      }
    }
  }
}

}  // namespace sws
