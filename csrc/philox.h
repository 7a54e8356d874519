// Philox4x32-10 counter-based random integers, shared word for word by the host compiler and nvcc.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the known-answer vectors of
// its Random123 distribution are in tests/ops/test_normal.py. Counter layout (fastebm/rng.py numbers the streams):
//
//   key     = (seed low, seed high)
//   counter = (quad, step, chain low 32 bits, stream << 24 | chain high 24 bits)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTEBM_INLINE __host__ __device__ __forceinline__
#else
#define FASTEBM_INLINE inline __attribute__((always_inline))
#endif

namespace fastebm {

struct Quad {
  uint32_t lane[4];
};

// What is constant for one chain at one step; only the quad index runs.
struct NoiseAddress {
  uint32_t seed_low, seed_high, step, chain_low, stream_and_chain_high;
};

// The widest values that the counter has room for.
constexpr int64_t kMaxStep = int64_t{1} << 32;
constexpr int64_t kMaxChain = int64_t{1} << 56;

FASTEBM_INLINE bool addressable(int64_t step, int64_t chain) {
  return step >= 0 && step < kMaxStep && chain >= 0 && chain < kMaxChain;
}

FASTEBM_INLINE NoiseAddress noise_address(int64_t seed, int64_t step, int64_t chain, int64_t stream) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32), static_cast<uint32_t>(step),
          static_cast<uint32_t>(chain),
          static_cast<uint32_t>(stream) << 24 | static_cast<uint32_t>(static_cast<uint64_t>(chain) >> 32)};
}

struct Product {
  uint32_t high, low;
};

FASTEBM_INLINE Product product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(a, b), a * b};  // one wide multiplication; shifting a 64-bit product takes an addition of zero besides
#else
  return {static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32), a * b};
#endif
}

FASTEBM_INLINE Quad philox(uint32_t quad, const NoiseAddress& at) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t c0 = quad, c1 = at.step, c2 = at.chain_low, c3 = at.stream_and_chain_high;
  uint32_t k0 = at.seed_low, k1 = at.seed_high;
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const Product first = product(kMultiplier0, c0), second = product(kMultiplier1, c2);
    c0 = second.high ^ c1 ^ k0;
    c1 = second.low;
    c2 = first.high ^ c3 ^ k1;
    c3 = first.low;
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastebm
