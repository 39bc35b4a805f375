// Queries and settings of the current CUDA device that the launch functions need.
//
// A failed call of the CUDA runtime also sets the thread's last error, which a later cudaGetLastError() would return as
// if it came from another launch. Every function here clears it, so an error is reported exactly once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

namespace sws {

constexpr int kMaxGridZ = 65535;
constexpr int kDefaultSharedBytes = 48 * 1024;

// Returns `error` after clearing the thread's last error.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

inline cudaError_t current_device_attribute(int* value, cudaDeviceAttr attribute) {
  int device = 0;
  if (cudaError_t error = reported(cudaGetDevice(&device)); error != cudaSuccess) return error;
  return reported(cudaDeviceGetAttribute(value, attribute, device));
}

// Whether 16-byte vectors can be read at this address.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline cudaError_t processor_count(int* count) {
  return current_device_attribute(count, cudaDevAttrMultiProcessorCount);
}

// Largest dynamic shared memory of a block that a kernel can be given.
inline cudaError_t shared_memory_limit(int* bytes) {
  return current_device_attribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Allows launches of `kernel` with up to the device's limit of dynamic shared memory; without it the limit is 48 KB.
// The attribute is set once for each kernel and device, and always to the same value: with a value for each launch, one
// thread could lower it between another thread's call and its launch.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int device = 0;
  if (cudaError_t error = reported(cudaGetDevice(&device)); error != cudaSuccess) return error;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  int limit = 0;
  if (cudaError_t error = shared_memory_limit(&limit); error != cudaSuccess) return error;
  const cudaError_t error = reported(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// Blocks of `kernel` that fit on a multiprocessor at a time; 0 if a block exceeds the device's limits. Requires
// allow_shared_memory(kernel).
inline cudaError_t resident_blocks(int* blocks, const void* kernel, int threads, int shared_bytes) {
  return reported(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, static_cast<size_t>(shared_bytes)));
}

}  // namespace sws
