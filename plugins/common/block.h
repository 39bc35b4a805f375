// The operations that kernel bodies use: one thread block, its shared memory, its warp-wide instructions.
//
// A body is written for the whole block: `each_thread(work)` runs work(thread) for every thread, PerThread<T> is a
// variable of which every thread has a copy, and warp-wide operations take accessors thread -> registers. On the device
// each_thread is a call, PerThread<T> a register, and the abstraction compiles to nothing.
// tests/plugins/harness/emulated_block.h implements the same interface on a CPU: it runs the threads sequentially and
// checks every access to shared memory for bounds and for races between barriers.
#pragma once

#ifndef __CUDACC__
#include "emulated_block.h"
#else

#include <cstdint>
#include <type_traits>

#include "common/number_formats.h"
#include "common/platform.h"

namespace sws {

template <typename T, int kThreads>
class PerThread {
 public:
  __device__ __forceinline__ T& operator[](int) { return value_; }

 private:
  T value_;
};

// An array in shared memory. The thread argument is used by the emulation only.
template <typename T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
  __device__ __forceinline__ T load(int index, int) const { return data_[index]; }
  __device__ __forceinline__ void store(int index, T value, int) const { data_[index] = value; }
  __device__ __forceinline__ T* at(int index) const { return data_ + index; }

 private:
  T* data_;
};

extern __shared__ __align__(16) unsigned char sws_shared_memory[];

template <int kThreadCount>
class Block {
 public:
  static constexpr int kThreads = kThreadCount;

  __device__ __forceinline__ int x() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int y() const { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ int z() const { return static_cast<int>(blockIdx.z); }
  __device__ __forceinline__ int grid_x() const { return static_cast<int>(gridDim.x); }

  template <typename T>
  __device__ __forceinline__ Shared<T> shared(int byte_offset, int /*count*/) {
    return Shared<T>(reinterpret_cast<T*>(sws_shared_memory + byte_offset));
  }

  template <typename Work>
  __device__ __forceinline__ void each_thread(Work work) {
    work(static_cast<int>(threadIdx.x));
  }

  __device__ __forceinline__ void sync() { __syncthreads(); }

  // Replaces each thread's value by that of the lane whose number differs in the bits of mask.
  __device__ __forceinline__ void shuffle_xor(PerThread<float, kThreads>& values, int mask) {
    values[0] = __shfl_xor_sync(0xFFFFFFFFu, values[0], mask);
  }

  // Copies 16 bytes from global to shared memory, asynchronously until wait_copies; zeros if `valid` is false.
  template <typename Element>
  __device__ __forceinline__ void copy_16_bytes(Shared<Element> to, int index, const Element* from, bool valid, int) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at(index)));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes));
  }

  // Copies four bytes in the same way.
  __device__ __forceinline__ void copy_4_bytes(Shared<float> to, int index, const float* from, bool valid, int) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at(index)));
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(from), "r"(bytes));
  }

  // Stores two 16-bit elements to global memory in one transaction; `to` is aligned to 4 bytes.
  template <typename Element>
  __device__ __forceinline__ void store_pair(Element* to, uint32_t pair) {
    static_assert(sizeof(Element) == 2, "a pair has 32 bits");
    *reinterpret_cast<uint32_t*>(to) = pair;
  }

  // Closes the group of copies issued since the last call (an empty group counts too).
  __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::); }

  // Waits until at most kPending groups are in flight. Other threads can read the data after the next sync.
  template <int kPending>
  __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
  }

  // Loads four 8 x 8 matrices of 16-bit numbers. Lanes 8m .. 8m+7 pass the index of the first element of each row of
  // matrix m. Lane l receives elements 2(l % 4) and 2(l % 4) + 1 of row l / 4 (kTransposed: of column l / 4).
  template <bool kTransposed, typename Element, typename RowIndex, typename Registers>
  __device__ __forceinline__ void load_matrices(Shared<Element> from, RowIndex row_index, Registers registers) {
    const int thread = static_cast<int>(threadIdx.x);
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(from.at(row_index(thread))));
    uint32_t* out = registers(thread);
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                   : "r"(address));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                   : "r"(address));
    }
  }

  // D += A B of a 16 x 16 (A) by 16 x 8 (B) product in each warp, with float accumulation.
  template <typename Element, typename RegistersD, typename RegistersA, typename RegistersB>
  __device__ __forceinline__ void multiply_add(RegistersD d_of, RegistersA a_of, RegistersB b_of) {
    const int thread = static_cast<int>(threadIdx.x);
    float* d = d_of(thread);
    multiply_fragments<Element>(d, a_of(thread), b_of(thread), d[0], d[1], d[2], d[3]);
  }

  // D = A B: the accumulator starts at zero without an instruction that clears it.
  template <typename Element, typename RegistersD, typename RegistersA, typename RegistersB>
  __device__ __forceinline__ void multiply(RegistersD d_of, RegistersA a_of, RegistersB b_of) {
    const int thread = static_cast<int>(threadIdx.x);
    multiply_fragments<Element>(d_of(thread), a_of(thread), b_of(thread), 0.0f, 0.0f, 0.0f, 0.0f);
  }

 private:
  // D = A B + C.
  template <typename Element>
  __device__ __forceinline__ static void multiply_fragments(float* d, const uint32_t* a, const uint32_t* b, float c0,
                                                            float c1, float c2, float c3) {
    if constexpr (std::is_same_v<Element, BFloat16>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
    } else {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
          "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
    }
  }
};

}  // namespace sws

#endif  // __CUDACC__
