// What differs between a CUDA compiler and a C++ compiler.
//
// Arithmetic is marked SWS_HD and exists for both. Kernel bodies are marked SWS_KERNEL_BODY: nvcc compiles
// them for the device, a C++ compiler compiles the very same text against the emulated block of
// tests/plugins/harness, which is how they are tested on a machine without a GPU.
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
