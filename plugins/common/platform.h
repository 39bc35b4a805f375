// Macros for code that both a CUDA compiler and a C++ compiler compile.
//
// Arithmetic is marked SWS_HD: host and device functions. Kernel bodies are marked SWS_KERNEL_BODY: nvcc compiles them
// for the device; a C++ compiler compiles the same code with the emulated block of tests/plugins/harness, for tests on
// a machine without a GPU.
#pragma once

#ifdef __CUDACC__
#define SWS_HD __host__ __device__ __forceinline__
#define SWS_KERNEL_BODY __device__ __forceinline__
#define SWS_UNROLL _Pragma("unroll")
#else
#define SWS_HD inline
#define SWS_KERNEL_BODY inline
#define SWS_UNROLL
#endif
