// Reads and writes several neighbouring values at once, 16 bytes where the layout allows (a pack).
#pragma once

#include "quads.h"

namespace fastebm::cuda {

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T value[n];
};

template <class T, int n>
__device__ __forceinline__ void read_pack(float (&to)[n], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = widened(pack.value[i]);
}

template <class T, int n>
__device__ __forceinline__ void write_pack(T* to, const float (&from)[n]) {
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) pack.value[i] = narrowed<T>(from[i]);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// Index of this thread's pack.
__device__ __forceinline__ int64_t pack_of_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

inline unsigned blocks_for(int64_t packs) { return static_cast<unsigned>((packs + kThreads - 1) / kThreads); }

// run<T, n>() with T the type and n the values in a pack: kPack<T> where the layout holds whole packs, else 1.
template <class Run>
void dispatch(Type type, bool packs, const Run& run) {
  const auto sized = [&]<class T>() { packs ? run.template operator()<T, kPack<T>>() : run.template operator()<T, 1>(); };
  switch (type) {
    case Type::float32: return sized.template operator()<float>();
    case Type::bfloat16: return sized.template operator()<__nv_bfloat16>();
    case Type::float16: return sized.template operator()<__half>();
  }
}

}  // namespace fastebm::cuda
