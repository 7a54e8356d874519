// Kernels with one mistake each, and their twins without it: what the checker must catch, and what it must let pass.
//
// Each is run over `in` and `out`, 256 floats that are given to it, in blocks of 64 threads.
#include "packs.h"

namespace fastebm::cuda {
namespace {

constexpr int kBlock = 64, kBlocks = 4;

__device__ unsigned index() { return blockIdx.x * kBlock + threadIdx.x; }

__global__ void copy(const float* in, float* out) { out[index()] = in[index()]; }
__global__ void copy_past_the_end(const float* in, float* out) { out[index()] = in[index() + 1]; }
__global__ void copy_before_the_start(const float* in, float* out) { (out - 1)[index()] = in[index()]; }
__global__ void write_the_input(const float* in, float* out) { const_cast<float*>(in)[index()] = out[index()]; }

__global__ void copy_packs(const float* in, float* out) {
  if (index() >= 64) return;
  float four[4];
  read_pack(four, in + 4 * index());
  write_pack(out + 4 * index(), four);
}
__global__ void copy_packs_misaligned(const float* in, float* out) {
  if (index() >= 63) return;
  float four[4];
  read_pack(four, in + 4 * index() + 1);
  write_pack(out + 4 * index(), four);
}

// Each block turns its elements around.
__global__ void reverse(const float* in, float* out) {
  __shared__ float turned[kBlock];
  turned[kBlock - 1 - threadIdx.x] = in[index()];
  __syncthreads();
  out[index()] = turned[threadIdx.x];
}
__global__ void reverse_without_a_barrier(const float* in, float* out) {
  __shared__ float turned[kBlock];
  turned[kBlock - 1 - threadIdx.x] = in[index()];
  out[index()] = turned[threadIdx.x];
}
__global__ void reverse_of_half(const float* in, float* out) {
  __shared__ float turned[kBlock];
  if (threadIdx.x < kBlock / 2) turned[kBlock - 1 - threadIdx.x] = in[index()];
  __syncthreads();
  out[index()] = turned[threadIdx.x];
}

// The sum of a block by halves, twice; the second begins only when all have read the first.
template <bool barrier>
__global__ void sums(const float* in, float* out) {
  __shared__ float lanes[kBlock];
  float sum = 0;
  for (int repeat = 0; repeat < 2; ++repeat) {
    lanes[threadIdx.x] = in[index()];
    for (unsigned half = kBlock / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    }
    __syncthreads();
    sum += lanes[0];
    if (barrier) __syncthreads();
  }
  out[index()] = sum;
}

__global__ void barrier_of_half(const float* in, float* out) {
  if (threadIdx.x < kBlock / 2) __syncthreads();
  out[index()] = in[index()];
}
__global__ void different_barriers(const float* in, float* out) {
  if (threadIdx.x < kBlock / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[index()] = in[index()];
}

// All blocks write the first 64 elements.
__global__ void race_between_blocks(const float* in, float* out) { out[threadIdx.x] = in[index()]; }
// A block reads what another writes.
__global__ void read_of_another_block(const float* in, float* out) {
  out[index()] = in[index()];
  if (blockIdx.x > 0) out[index()] += out[0];
}
// One thread writes what its neighbour writes too.
__global__ void race_within_a_block(const float* in, float* out) { out[index() & ~1u] = in[index()]; }

__global__ void shift_by_too_much(const float* in, float* out) {
  out[index()] = static_cast<float>(1 << (threadIdx.x + static_cast<int>(in[0])));
}
__global__ void index_past_an_array(const float* in, float* out) {
  float few[4] = {in[0], in[1], in[2], in[3]};
  out[index()] = few[threadIdx.x];
}

template <void (*kernel)(const float*, float*), bool elsewhere = false>
const char* run(const float* in, float* out) {
  launch(kernel, kBlocks, kBlock, elsewhere ? reinterpret_cast<Stream>(out) : nullptr, in, out);
  return launch_error();
}

}  // namespace
}  // namespace fastebm::cuda

// How many x between bits `first` and `last`, each `stride`, have another root than the rounded one, where the approximate
// root begins `error` units off.
extern "C" __attribute__((visibility("default"))) unsigned wrong_roots(unsigned first, unsigned last, unsigned stride,
                                                                       int error) {
  unsigned wrong = 0;
  host_build::fix_rsqrt_error(error);
  for (unsigned bits = first; bits < last; bits += stride) {
    const float x = std::bit_cast<float>(bits);
    wrong += std::bit_cast<unsigned>(fastebm::root_of_log(x)) != std::bit_cast<unsigned>(std::sqrt(x));
  }
  return wrong;
}

#define SPECIMEN(name, ...) \
  __attribute__((visibility("default"))) const char* name(const float* in, float* out) { return run<__VA_ARGS__>(in, out); }

using namespace fastebm::cuda;
extern "C" {
SPECIMEN(specimen_copy, copy)
SPECIMEN(specimen_copy_past_the_end, copy_past_the_end)
SPECIMEN(specimen_copy_before_the_start, copy_before_the_start)
SPECIMEN(specimen_write_the_input, write_the_input)
SPECIMEN(specimen_copy_packs, copy_packs)
SPECIMEN(specimen_copy_packs_misaligned, copy_packs_misaligned)
SPECIMEN(specimen_reverse, reverse)
SPECIMEN(specimen_reverse_without_a_barrier, reverse_without_a_barrier)
SPECIMEN(specimen_reverse_of_half, reverse_of_half)
SPECIMEN(specimen_sums, sums<true>)
SPECIMEN(specimen_sums_without_a_barrier, sums<false>)
SPECIMEN(specimen_barrier_of_half, barrier_of_half)
SPECIMEN(specimen_different_barriers, different_barriers)
SPECIMEN(specimen_race_between_blocks, race_between_blocks)
SPECIMEN(specimen_read_of_another_block, read_of_another_block)
SPECIMEN(specimen_race_within_a_block, race_within_a_block)
SPECIMEN(specimen_shift_by_too_much, shift_by_too_much)
SPECIMEN(specimen_index_past_an_array, index_past_an_array)
SPECIMEN(specimen_on_another_stream, copy, true)
}
