// The few questions the launches ask the CUDA runtime about the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sws {

constexpr int kMaxGridZ = 65535;
constexpr int kDefaultSharedBytes = 48 * 1024;

inline cudaError_t current_device_attribute(int* value, cudaDeviceAttr attribute) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(value, attribute, device);
}

// Whether vectors of 16 bytes may be read from there.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline cudaError_t processor_count(int* count) {
  return current_device_attribute(count, cudaDevAttrMultiProcessorCount);
}

inline cudaError_t shared_memory_limit(int* bytes) {
  return current_device_attribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// More than 48 KB of dynamic shared memory has to be asked for, kernel by kernel.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace sws
