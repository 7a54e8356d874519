// Fills (B, ...) with noise on a GPU: the shared body of `normal` and `uniform`.
#pragma once

#include "packs.h"

namespace fastebm::cuda {

struct NormalNoise {
  static __device__ __forceinline__ void draw(const Quad& words, float (&drawn)[4]) { normals(words, drawn); }
};

struct UniformNoise {
  static __device__ __forceinline__ void draw(const Quad& words, float (&drawn)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) drawn[i] = uniform_from_bits(words.lane[i]);
  }
};

template <class Noise, class T, bool vectors>
__global__ void __launch_bounds__(kThreads) fill_kernel(const FillArguments fill, const Tiling tiles) {
  int64_t slot, quad;
  if (!locate(tiles, slot, quad)) return;
  bool valid;
  float drawn[4];
  Noise::draw(words_of(fill.address, slot, quad, fill.stream, valid), drawn);
#pragma unroll
  for (int i = 0; i < 4; ++i) drawn[i] = valid ? drawn[i] : NAN;
  T* out = static_cast<T*>(fill.out) + slot * fill.elements + 4 * quad;
  if constexpr (vectors) {
    write_pack(out, drawn);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * quad + i < fill.elements) out[i] = narrowed<T>(drawn[i]);
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
