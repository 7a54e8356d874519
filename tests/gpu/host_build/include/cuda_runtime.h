// As much of CUDA as csrc/cuda uses, for a C++ compiler: checker.h runs the threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>

#include "../checker.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One thread of the system runs a whole grid, so what is local to it is shared by a block; checker.cpp knows where that lies.
#define __shared__ static thread_local

inline const host_build::Index &threadIdx = host_build::places[0], &blockIdx = host_build::places[1],
                               &blockDim = host_build::places[2], &gridDim = host_build::places[3];

using std::isfinite;
using std::max;
using std::min;

inline void __syncthreads(std::source_location where = std::source_location::current()) { host_build::wait_at_barrier(where); }

// Every operation rounds to nearest, as the compiler's flags make it on the CPU too.
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline float rsqrt_approx_ftz(float x) {
  const float nearest = static_cast<float>(1 / std::sqrt(static_cast<double>(x)));
  return std::bit_cast<float>(std::bit_cast<int>(nearest) + host_build::rsqrt_error());
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

using cudaError_t = const char*;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = nullptr;
inline cudaError_t cudaGetLastError() { return host_build::last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return error; }

struct dim3 : host_build::Index {
  dim3(unsigned wide = 1, unsigned high = 1, unsigned deep = 1) : Index{wide, high, deep} {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Given>
[[gnu::noinline]] cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                                 Given&&... given) {
  const std::tuple<Parameters...> arguments(given...);
  host_build::launch(config->gridDim, config->blockDim, config->stream, [&] { std::apply(kernel, arguments); },
                     __builtin_frame_address(0));
  return cudaSuccess;
}
