// CUDA: one Langevin update in one pass, which draws the noise in registers.
//
// Clipping by the norm and a hinge need a factor for each chain, which a kernel sums up before it.
// Bytes: 12 an element (read x and gradient, write x) in float32. The plain kernel, for contiguous tensors
// and no option, is all 16-byte accesses; the general one takes any strides and options, whose switches are the same for all
// threads.
#include "packs.h"

namespace fastebm::cuda {
namespace {

// Lanes of the fixed summation order; see csrc/cpu/langevin.cpp.
constexpr int kSumLanes = 1024;

// Comparisons written so that NaN passes through.
__device__ __forceinline__ float limited(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// (channel, pixel) of an element. 64-bit division costs some 100 instructions, 32-bit 20.
__device__ __forceinline__ void split(int64_t element, int64_t pixels, int64_t& channel, int64_t& pixel) {
  if ((element | pixels) >> 32) {
    channel = element / pixels;
    pixel = element % pixels;
  } else {
    channel = static_cast<uint32_t>(element) / static_cast<uint32_t>(pixels);
    pixel = static_cast<uint32_t>(element) % static_cast<uint32_t>(pixels);
  }
}

template <class T>
__device__ __forceinline__ T* at(const Image& image, int64_t slot, int64_t channel, int64_t pixel) {
  return static_cast<T*>(image.data) + slot * image.batch_stride + channel * image.channel_stride + pixel * image.pixel_stride;
}

// An element of a chain, which takes no division where its elements lie in order.
template <class T>
__device__ __forceinline__ T element_of(const Image& image, int64_t slot, int64_t element, int64_t pixels) {
  if (image.pixel_stride == 1 && image.channel_stride == pixels)
    return static_cast<const T*>(image.data)[slot * image.batch_stride + element];
  int64_t channel, pixel;
  split(element, pixels, channel, pixel);
  return *at<const T>(image, slot, channel, pixel);
}

// One quad of a chain: how many of its elements exist, and where they lie in tensors of any strides.
struct QuadPlace {
  int64_t slot, quad, elements, pixels, channel, pixel;
  int count;

  // From int64_t on: four times the quad is an element, of which a chain may have 2^33.
  __device__ __forceinline__ QuadPlace(int64_t of_slot, int64_t of_quad, const LangevinArguments& step)
      : slot(of_slot), quad(of_quad), elements(step.channels * step.pixels), pixels(step.pixels),
        count(static_cast<int>(min(int64_t{4}, elements - 4 * of_quad))) {
    split(4 * of_quad, pixels, channel, pixel);
  }

  // Runs visit(i, pointer) over the elements that exist.
  template <class T, class Visit>
  __device__ __forceinline__ void each(const Image& image, Visit visit) const {
    int64_t c = channel, p = pixel;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) visit(i, at<T>(image, slot, c, p));
      if (++p == pixels) {
        p = 0;
        ++c;
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void read(float (&to)[4], const Image& image, const QuadPlace& place) {
  if (image.vectors) return read_pack(to, static_cast<const T*>(image.data) + place.slot * place.elements + 4 * place.quad);
  place.each<T>(image, [&](int i, const T* value) { to[i] = widened(*value); });
}

__device__ __forceinline__ void read(bool (&to)[4], const Image& image, const QuadPlace& place) {
  if (image.vectors) {
    const auto four = *reinterpret_cast<const Pack<bool, 4>*>(static_cast<const bool*>(image.data) + place.slot * place.elements +
                                                              4 * place.quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = four.value[i];
    return;
  }
  place.each<bool>(image, [&](int i, const bool* value) { to[i] = *value; });
}

// Row of a table that is used now: the schedule index, or the last row. A negative index is out of order and makes NaN.
__device__ __forceinline__ int64_t row_of(const LangevinArguments& step, int64_t rows) {
  const auto index = static_cast<uint64_t>(step.address.key[2]), last = static_cast<uint64_t>(rows - 1);
  return static_cast<int64_t>(min(index, last));
}

// What is the same for all elements of a chain.
struct ChainUpdate {
  ChainNoise noise;
  float drift, noise_std;  // NaN where the address or the schedule index is out of range, so that all elements become it

  __device__ __forceinline__ ChainUpdate(const LangevinArguments& step, unsigned slot) : noise(step.address, slot, 0) {
    const int64_t row = row_of(step, step.schedule_rows);
    const float* pair = step.schedule + 2 * (step.per_chain ? row * step.batch + slot : row);
    drift = noise.valid && step.address.key[2] >= 0 ? -pair[0] : NAN;
    noise_std = pair[1];
  }

  // x + drift + noise of n quads, before clamp and mask.
  template <unsigned n>
  __device__ __forceinline__ void advance(float (&x)[n][4], const float (&g)[n][4], const Stretch& stretch,
                                          unsigned first) const {
#pragma unroll
    for (unsigned q = 0; q < n; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[q][i] = fused(drift, g[q][i], x[q][i]);
    if (noise_std == 0) return;
    float drawn[n][4];
#pragma unroll
    for (unsigned q = 0; q < n; ++q) noise.normals(stretch.quad(first + q), drawn[q]);
#pragma unroll
    for (unsigned q = 0; q < n; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[q][i] = fused(noise_std, drawn[q][i], x[q][i]);
  }
};

template <class Gradient>
__global__ void __launch_bounds__(kThreads) plain_kernel(const LangevinArguments step, const Tiling tiles) {
  const Stretch stretch(tiles);
  if (!stretch.has(0)) return;
  const int64_t first = 4 * (static_cast<int64_t>(stretch.slot) * tiles.quads + stretch.first);
  unsigned later[kQuads];  // elements; a quad beyond the end is read as the first, and not written
  float x[kQuads][4], g[kQuads][4];
#pragma unroll
  for (unsigned q = 0; q < kQuads; ++q) {
    later[q] = stretch.has(q) ? 4 * q * stretch.apart : 0;
    read_pack(x[q], static_cast<const float*>(step.x.data) + first + later[q]);
    read_pack(g[q], static_cast<const Gradient*>(step.grad.data) + first + later[q]);
  }
  const ChainUpdate update(step, stretch.slot);
  update.advance(x, g, stretch, 0);
#pragma unroll
  for (unsigned q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[q][i] = limited(x[q][i], step.clamp_min, step.clamp_max);
    if (stretch.has(q)) write_pack(static_cast<float*>(step.out.data) + first + later[q], x[q]);
  }
}

template <class Gradient>
__global__ void __launch_bounds__(kThreads) general_kernel(const LangevinArguments step, const Tiling tiles) {
  const Stretch stretch(tiles);
  if (!stretch.has(0)) return;
  const unsigned slot = stretch.slot;
  const ChainUpdate update(step, slot);
  const float scale = step.factors ? step.factors[2 * slot] : 1.0f;
#pragma unroll 1
  for (unsigned q = 0; q < kQuads && stretch.has(q); ++q) {
    const QuadPlace place(slot, stretch.quad(q), step);
    float states[1][4] = {}, gradients[1][4] = {}, side[4] = {};
    auto &x = states[0], &g = gradients[0];
    read<float>(x, step.x, place);
    read<Gradient>(g, step.grad, place);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] = limited(g[i], -step.grad_clip, step.grad_clip) * scale;
    if (step.data_target.data) {
      const float weight = step.factors ? step.factors[2 * slot + 1] : step.data_term_weight[row_of(step, step.weight_rows)];
      read<float>(side, step.data_target, place);
      if (weight != 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) g[i] = fused(weight, x[i] - side[i], g[i]);
      }
    }
    update.advance(states, gradients, stretch, q);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = limited(x[i], step.clamp_min, step.clamp_max);
    if (step.lower_bounds.data) {
      read<float>(side, step.lower_bounds, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = x[i] < side[i] ? side[i] : x[i];
    }
    if (step.upper_bounds.data) {
      read<float>(side, step.upper_bounds, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = x[i] > side[i] ? side[i] : x[i];
    }
    if (step.mask.data) {
      bool masked[4] = {};
      read(masked, step.mask, place);
      read<float>(side, step.known, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = masked[i] ? side[i] : x[i];
    }
    if (step.out.vectors) write_pack(static_cast<float*>(step.out.data) + place.slot * place.elements + 4 * place.quad, x);
    else place.each<float>(step.out, [&](int i, float* value) { *value = x[i]; });
  }
}

// The sum of all lanes, folded in halves, in every thread.
__device__ __forceinline__ float fold(float* lanes, float mine) {
  lanes[threadIdx.x] = mine;
  for (unsigned half = kSumLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  __syncthreads();
  const float sum = lanes[0];
  __syncthreads();  // before the lanes are used again
  return sum;
}

// (gradient scale, data term's weight) of one chain, which is one block; a thread is a lane.
template <class Gradient>
__global__ void __launch_bounds__(kSumLanes, 1) factors_kernel(const LangevinArguments step) {
  __shared__ float lanes[kSumLanes];
  const int64_t slot = blockIdx.x, elements = step.channels * step.pixels;
  float scale = 1, weight = 0, mine = 0;
  if (isfinite(step.grad_norm_clip)) {
    for (int64_t element = threadIdx.x; element < elements; element += kSumLanes) {
      const float g = widened(element_of<Gradient>(step.grad, slot, element, step.pixels));
      mine = fused(g, g, mine);
    }
    const float norm = rounded_sqrt(fold(lanes, mine));
    if (norm > step.grad_norm_clip) scale = __fdiv_rn(step.grad_norm_clip, norm);
  }
  if (step.data_target.data) weight = step.data_term_weight[row_of(step, step.weight_rows)];
  if (step.data_target.data && step.data_term_hinge > 0) {
    mine = 0;
    for (int64_t element = threadIdx.x; element < elements; element += kSumLanes) {
      const float d =
          element_of<float>(step.x, slot, element, step.pixels) - element_of<float>(step.data_target, slot, element, step.pixels);
      mine = fused(d, d, mine);
    }
    if (!(fold(lanes, mine) > step.data_term_hinge)) weight = 0;
  }
  if (threadIdx.x == 0) {
    step.factors[2 * slot] = scale;
    step.factors[2 * slot + 1] = weight;
  }
}

template <class Gradient>
void launch_as(const LangevinArguments& step, Stream stream) {
  const Tiling tiles = tiling(step.batch, step.channels * step.pixels);
  const bool plain = step.out.vectors && step.x.vectors && step.grad.vectors && !step.lower_bounds.data &&
                     !step.upper_bounds.data && !step.mask.data && !step.data_target.data && !step.factors &&
                     !std::isfinite(step.grad_clip);
  if (step.factors) launch(factors_kernel<Gradient>, static_cast<unsigned>(step.batch), kSumLanes, stream, step);
  if (plain) launch(plain_kernel<Gradient>, blocks(tiles), kThreads, stream, step, tiles);
  else launch(general_kernel<Gradient>, blocks(tiles), kThreads, stream, step, tiles);
}

}  // namespace

const char* launch_langevin_step(const LangevinArguments& arguments, Stream stream) {
  switch (arguments.grad_type) {
    case Type::float32: launch_as<float>(arguments, stream); break;
    case Type::bfloat16: launch_as<__nv_bfloat16>(arguments, stream); break;
    case Type::float16: launch_as<__half>(arguments, stream); break;
  }
  return launch_error();
}

}  // namespace fastebm::cuda
