// Fills (B, ...) with noise on a GPU: the shared body of `normal` and `uniform`.
#pragma once

#include "packs.h"

namespace fastebm::cuda {

struct NormalNoise {
  static __device__ __forceinline__ void draw(const ChainNoise& noise, unsigned quad, float (&drawn)[4]) {
    noise.normals(quad, drawn);
  }
};

struct UniformNoise {
  static __device__ __forceinline__ void draw(const ChainNoise& noise, unsigned quad, float (&drawn)[4]) {
    noise.uniforms(quad, drawn);
  }
};

template <class Noise, class T, bool vectors>
__global__ void __launch_bounds__(kThreads) fill_kernel(const FillArguments fill, const Tiling tiles) {
  const Stretch stretch(tiles);
  if (!stretch.has(0)) return;
  const ChainNoise noise(fill.address, stretch.slot, fill.stream);
  float drawn[kQuads][4];
#pragma unroll
  for (unsigned q = 0; q < kQuads; ++q) Noise::draw(noise, stretch.quad(q), drawn[q]);
  T* const chain = static_cast<T*>(fill.out) + stretch.slot * fill.elements;
#pragma unroll
  for (unsigned q = 0; q < kQuads; ++q) {
    if (!stretch.has(q)) return;
    const int64_t element = 4 * static_cast<int64_t>(stretch.quad(q));
    if constexpr (vectors) {
      write_pack(chain + element, drawn[q]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (element + i < fill.elements) chain[element + i] = narrowed<T>(drawn[q][i]);
    }
  }
}

template <class Noise, class T>
void fill_as(const FillArguments& fill, Stream stream) {
  const Tiling tiles = tiling(fill.batch, fill.elements);
  if (fill.vectors) launch(fill_kernel<Noise, T, true>, blocks(tiles), kThreads, stream, fill, tiles);
  else launch(fill_kernel<Noise, T, false>, blocks(tiles), kThreads, stream, fill, tiles);
}

template <class Noise>
const char* launch_fill(const FillArguments& fill, Stream stream) {
  switch (fill.type) {
    case Type::float32: fill_as<Noise, float>(fill, stream); break;
    case Type::bfloat16: fill_as<Noise, __nv_bfloat16>(fill, stream); break;
    case Type::float16: fill_as<Noise, __half>(fill, stream); break;
  }
  return launch_error();
}

}  // namespace fastebm::cuda
