// Assigns four consecutive elements of a chain (a quad) to each thread and draws their noise; for all CUDA noise kernels.
//
// A thread owns one quad: four consecutive elements, drawn from one counter, and one 16-byte access where they lie together. A
// block of threads covers 2^shift quads of kThreads / 2^shift chains, so that tiny images (4x4 is four quads) fill it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../normal.h"
#include "launch.h"

namespace fastebm::cuda {

constexpr int kThreads = 128;

struct Tiling {
  int64_t batch, quads;
  unsigned across;  // blocks from the first to the last quad of a chain
  int shift;
};

inline Tiling tiling(int64_t batch, int64_t elements) {
  Tiling t{batch, (elements + 3) / 4, 0, 0};
  while ((int64_t{1} << t.shift) < t.quads && (1 << t.shift) < kThreads) ++t.shift;
  t.across = static_cast<unsigned>((t.quads + (int64_t{1} << t.shift) - 1) >> t.shift);
  return t;
}

inline unsigned blocks(const Tiling& t) {
  const int64_t slots = kThreads >> t.shift;
  return t.across * static_cast<unsigned>((t.batch + slots - 1) / slots);
}

// Slot in the batch and quad of this thread; false where there is none.
__device__ __forceinline__ bool locate(const Tiling& t, int64_t& slot, int64_t& quad) {
  quad = (static_cast<int64_t>(blockIdx.x % t.across) << t.shift) + (threadIdx.x & ((1u << t.shift) - 1));
  slot = static_cast<int64_t>(blockIdx.x / t.across) * (kThreads >> t.shift) + (threadIdx.x >> t.shift);
  return slot < t.batch && quad < t.quads;
}

__device__ __forceinline__ int64_t chain_of(const Address& address, int64_t slot) {
  return address.listed ? address.chain_ids[slot] : address.chain_ids[0] + slot;
}

// The words of one quad, and whether the counter has room for its step and chain: a kernel can't raise, so noise without room is
// NaN.
__device__ __forceinline__ Quad words_of(const Address& address, int64_t slot, int64_t quad, int64_t stream, bool& valid) {
  const int64_t step = address.key[1], chain = chain_of(address, slot);
  valid = addressable(step, chain);
  return philox(static_cast<uint32_t>(quad), noise_address(address.key[0], step, chain, stream));
}

__device__ __forceinline__ void normals(const Quad& words, float (&drawn)[4]) {
  normal_pair(words.lane[0], words.lane[1], drawn[0], drawn[1]);
  normal_pair(words.lane[2], words.lane[3], drawn[2], drawn[3]);
}

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrowed(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  else return v;
}

// A launch as a plain call, which any C++ compiler reads: tests/gpu/host_build runs these files on a CPU.
template <class... Parameters, class... Given>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, Stream stream, const Given&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, given...);  // launch_error says whether it failed
}

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastebm::cuda
