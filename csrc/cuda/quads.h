// Assigns quads, which are four consecutive elements of a chain, to threads and draws their noise; for all CUDA noise kernels.
//
// A quad is drawn from one counter and is one 16-byte access where its elements lie together. A thread makes kQuads of them, so
// that what is the same for all of a chain is loaded and computed once for them. A block of threads covers kQuads 2^shift quads
// of kThreads / 2^shift chains, so that tiny images (4x4 is four quads) fill it too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../normal.h"
#include "launch.h"

namespace fastebm::cuda {

constexpr int kThreads = 128;

constexpr unsigned kQuads = 2;

struct Tiling {
  unsigned batch, quads;
  int shift;
};

inline Tiling tiling(int64_t batch, int64_t elements) {
  Tiling t{static_cast<unsigned>(batch), static_cast<unsigned>((elements + 3) / 4), 0};
  while (kQuads << t.shift < t.quads && 1 << t.shift < kThreads) ++t.shift;
  return t;
}

// x runs along a chain; y and z, which hold 65,535 each, over the batch.
inline dim3 blocks(const Tiling& t) {
  const unsigned span = kQuads << t.shift, slots = kThreads >> t.shift;
  const unsigned groups = (t.batch - 1) / slots + 1, rows = groups < 65535 ? groups : 65535;
  return {(t.quads - 1) / span + 1, rows, (groups - 1) / rows + 1};
}

// The quads of a thread: `first`, and every `apart` from there, of the chain in one slot of the batch.
struct Stretch {
  unsigned slot, first, apart, end;

  __device__ __forceinline__ explicit Stretch(const Tiling& t)
      : slot((blockIdx.z * gridDim.y + blockIdx.y) * (kThreads >> t.shift) + (threadIdx.x >> t.shift)),
        first((blockIdx.x * kQuads << t.shift) + (threadIdx.x & ((1u << t.shift) - 1))), apart(1u << t.shift),
        end(slot < t.batch ? t.quads : 0) {}

  __device__ __forceinline__ unsigned quad(unsigned i) const { return first + i * apart; }
  __device__ __forceinline__ bool has(unsigned i) const { return quad(i) < end; }
};

// Where the noise of one chain lies, and whether the counter has room for its step and id: a kernel can't raise, so noise
// without room is NaN.
struct ChainNoise {
  NoiseAddress at;
  bool valid;

  __device__ __forceinline__ ChainNoise(const Address& address, unsigned slot, int64_t stream) {
    const int64_t step = address.key[1];
    const int64_t chain = address.listed ? address.chain_ids[slot] : address.chain_ids[0] + slot;
    at = noise_address(address.key[0], step, chain, stream);
    valid = addressable(step, chain);
  }

  // Four normals, made NaN by the angle's last term where the address is not valid.
  __device__ __forceinline__ void normals(unsigned quad, float (&drawn)[4]) const {
    const Quad words = philox(quad, at);
    const float half = valid ? 0x1p-31f : NAN;
    normal_pair(words.lane[0], quarters_from_bits(words.lane[1], half), drawn[0], drawn[1]);
    normal_pair(words.lane[2], quarters_from_bits(words.lane[3], half), drawn[2], drawn[3]);
  }

  __device__ __forceinline__ void uniforms(unsigned quad, float (&drawn)[4]) const {
    const Quad words = philox(quad, at);
    const float half = valid ? 0x1p-33f : NAN;
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[i] = uniform_from_bits(words.lane[i], half);
  }
};

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
