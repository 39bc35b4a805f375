// The host side of the launches on a simulated CUDA runtime: launches CHECK. Exits with 1 and a reason on failure.
//
// The functions of the CUDA runtime that plugins/common/device.h calls are defined here.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/device.h"
#include "key_guard/tiling.h"

namespace {

struct Device {
  int block_limit;      // dynamic shared memory of a block, after opting in
  int processor_bytes;  // shared memory of a multiprocessor
};

constexpr int kReservedBytes = 1024;  // of shared memory for each block
const Device kAda = {99 * 1024, 100 * 1024};
const Device kAmpere = {163 * 1024, 164 * 1024};
const Device kHopper = {227 * 1024, 228 * 1024};

std::vector<Device> devices = {kHopper};
int register_blocks = 4;  // blocks on a multiprocessor for which there are registers
int attribute_calls = 0;
cudaError_t attribute_error = cudaSuccess;
std::map<std::pair<const void*, int>, int> attributes;
std::mutex mutex;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t finish(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

const char kernels[4] = {};  // their addresses stand for kernels

void check_limit_is_set_once() {
  devices = {kAda, kHopper};
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (current_device = 0; current_device < 2; ++current_device) {
      require(sws::allow_shared_memory(&kernels[0]) == cudaSuccess, "refused");
    }
  }
  require(attribute_calls == 2, "expected one call for each device, found " + std::to_string(attribute_calls));
  require(attributes.at({&kernels[0], 0}) == kAda.block_limit, "not the limit of device 0");
  require(attributes.at({&kernels[0], 1}) == kHopper.block_limit, "not the limit of device 1");
}

// Threads with problems of different sizes share a kernel: the limit must never be too low for any of them.
void check_threads_do_not_race() {
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int n = 0; n < 8; ++n) {
    threads.emplace_back([&, n] {
      for (int i = 0; i < 200; ++i) {
        int blocks = 0;
        if (sws::allow_shared_memory(&kernels[1]) != cudaSuccess) ++failures;
        sws::resident_blocks(&blocks, &kernels[1], 128, 60 * 1024 + 16 * 1024 * n);
        if (blocks == 0) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  require(failures == 0, std::to_string(failures) + " launches would have failed");
  require(attribute_calls == 1, "the attribute was set " + std::to_string(attribute_calls) + " times");
}

// A later cudaGetLastError() must not return the error again, and the next call tries again.
void check_errors_are_cleared() {
  attribute_error = cudaErrorInvalidValue;
  require(sws::allow_shared_memory(&kernels[2]) == cudaErrorInvalidValue, "the error was not returned");
  require(cudaGetLastError() == cudaSuccess, "the error remains the last error");
  attribute_error = cudaSuccess;
  require(sws::allow_shared_memory(&kernels[2]) == cudaSuccess, "the second call failed");
  current_device = 7;
  int value = 0;
  require(sws::processor_count(&value) != cudaSuccess, "a missing device was accepted");
  require(cudaGetLastError() == cudaSuccess, "the error of a query remains the last error");
}

struct TilingCase {
  const char* name;
  Device device;
  int blocks_by_registers;
  int head_size;
  int row_tiles;  // of 128 rows, times batch and heads
  sws::GuardTiling expected;
};

void check_tiling(const TilingCase& test) {
  devices = {test.device};
  register_blocks = test.blocks_by_registers;
  attributes = {{{&kernels[3], 0}, test.device.block_limit}};
  sws::GuardProblem problem = {};
  problem.batch = 2;
  problem.heads = test.row_tiles / 2;
  problem.query_tokens = 128;
  problem.head_size = test.head_size;
  constexpr int kProcessors = 100;
  sws::GuardTiling found{-1, -1};
  require(sws::choose_tiling(&kernels[3], problem, kProcessors, &found) == cudaSuccess, "refused");
  auto text = [](sws::GuardTiling tiling) {
    return std::to_string(tiling.row_warps) + " row warps, " + std::to_string(tiling.stages) + " stages";
  };
  require(found.stages == test.expected.stages && (found.stages == 0 || found.row_warps == test.expected.row_warps),
          std::string(test.name) + ", head size " + std::to_string(test.head_size) + ": expected " +
              text(test.expected) + ", found " + text(found));
}

void check_tiling_follows_occupancy() {
  constexpr int kMany = 800;
  const TilingCase cases[] = {
      {"4 blocks either way", kHopper, 4, 64, kMany, {4, 2}},
      {"3 blocks with two stages, 4 with one", kHopper, 4, 80, kMany, {4, 1}},
      {"3 blocks either way, for registers", kHopper, 3, 80, kMany, {4, 2}},
      {"1 block with two stages, 2 with one", kHopper, 4, 160, kMany, {4, 1}},
      {"1 block either way", kHopper, 4, 256, kMany, {4, 2}},
      {"1 block with two stages, 2 with one", kAda, 3, 64, kMany, {4, 1}},
      {"1 block with one stage, two do not fit", kAda, 3, 160, kMany, {4, 1}},
      {"not even one stage fits", kAda, 3, 256, kMany, {4, 0}},
      {"2 blocks with two stages, 3 with one", kAmpere, 3, 64, kMany, {4, 1}},
      {"3 blocks either way", kAmpere, 3, 40, kMany, {4, 2}},
      {"3 of 4 blocks for each multiprocessor", kHopper, 4, 80, 240, {4, 2}},
      {"one block for each multiprocessor", kHopper, 4, 80, 100, {2, 2}},
      {"fewer blocks than multiprocessors", kHopper, 4, 160, 30, {2, 2}},
      {"the smaller block has one stage", kAda, 3, 160, 30, {2, 1}},
  };
  for (const TilingCase& test : cases) check_tiling(test);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device >= static_cast<int>(devices.size())) return finish(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount ? 100 : devices[static_cast<size_t>(device)].block_limit;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (attribute_error != cudaSuccess) return finish(attribute_error);
  const std::lock_guard<std::mutex> lock(mutex);
  ++attribute_calls;
  attributes[{kernel, current_device}] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Device device = devices[static_cast<size_t>(current_device)];
  const bool allowed = static_cast<int>(bytes) <= attributes[{kernel, current_device}];
  *blocks =
      allowed ? std::min(register_blocks, device.processor_bytes / (static_cast<int>(bytes) + kReservedBytes)) : 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

}  // extern "C"

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> checks = {
      {"limit_is_set_once", check_limit_is_set_once},
      {"threads_do_not_race", check_threads_do_not_race},
      {"errors_are_cleared", check_errors_are_cleared},
      {"tiling_follows_occupancy", check_tiling_follows_occupancy},
  };
  if (argc != 2 || checks.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: launches CHECK\n");
    return 2;
  }
  try {
    checks.at(argv[1])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
