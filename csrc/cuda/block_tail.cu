// CUDA: pool, activate, add, blend in one pass over the images, and the derivatives.
//
// Bytes for each pooled pixel, in float32: 36 forward (read 4 pixels of main and of skip, write 1), 52 backward (read the
// gradient and 4 of main, write 4 of each). A thread owns n pooled elements that lie side by side: channels of a pixel in
// channels-last, pixels of a row in NCHW. Either way their windows are four packs of n values.
#include "../block_tail.h"
#include "packs.h"

namespace fastebm::cuda {
namespace {

// 64-bit division costs some 100 instructions, 32-bit 20.
__device__ __forceinline__ int64_t divided(int64_t value, int64_t by, int64_t& rest) {
  if ((value | by) >> 32) {
    rest = value % by;
    return value / by;
  }
  rest = static_cast<uint32_t>(value) % static_cast<uint32_t>(by);
  return static_cast<uint32_t>(value) / static_cast<uint32_t>(by);
}

// Offset of the window of a pooled element.
__device__ __forceinline__ int64_t window_of(const Pooling& pooling, int64_t element) {
  int64_t channel, pixel, row;
  const int64_t line = divided(divided(element, pooling.inner, channel), pooling.width, pixel);
  const int64_t plane = divided(line, pooling.height, row);
  return plane * pooling.input_plane + 2 * row * pooling.input_row + 2 * pixel * pooling.inner + channel;
}

// Two packs side by side, as NCHW has the pixels of n windows in a row.
template <class T, int n>
__device__ __forceinline__ void read_two(float (&to)[2 * n], const T* from) {
  float half[n];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    read_pack(half, from + side * n);
#pragma unroll
    for (int i = 0; i < n; ++i) to[side * n + i] = half[i];
  }
}

// Means over n windows.
template <class T, int n>
__device__ __forceinline__ void means(float (&out)[n], const void* image, int64_t window, const Pooling& pooling) {
  const T* top = static_cast<const T*>(image) + window;
  const T* bottom = top + pooling.input_row;
  if (pooling.inner > 1) {
    float a[n], b[n], c[n], d[n];
    read_pack(a, top);
    read_pack(b, bottom);
    read_pack(c, top + pooling.inner);
    read_pack(d, bottom + pooling.inner);
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = window_mean(a[i], b[i], c[i], d[i]);
  } else {
    float a[2 * n], b[2 * n];
    read_two<T, n>(a, top);
    read_two<T, n>(b, bottom);
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = window_mean(a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1]);
  }
}

// Writes each value to the four pixels of its window.
template <class T, int n>
__device__ __forceinline__ void spread(void* image, const float (&values)[n], int64_t window, const Pooling& pooling) {
  T* top = static_cast<T*>(image) + window;
  T* bottom = top + pooling.input_row;
  if (pooling.inner > 1) {
    write_pack(top, values);
    write_pack(bottom, values);
    write_pack(top + pooling.inner, values);
    write_pack(bottom + pooling.inner, values);
  } else {
    float half[n];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < n; ++i) half[i] = values[(side * n + i) / 2];
      write_pack(top + side * n, half);
      write_pack(bottom + side * n, half);
    }
  }
}

template <Activation kind, int order, int n>
__device__ __forceinline__ void activate_as(float (&out)[n], const float (&x)[n], float parameter) {
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = activated<kind, order>(x[i], parameter);
}

template <int order, int n>
__device__ __forceinline__ void activate(float (&out)[n], const float (&x)[n], const TailArguments& a) {
  switch (static_cast<Activation>(a.activation)) {
    case Activation::scaled_swish: return activate_as<Activation::scaled_swish, order>(out, x, a.parameter);
    case Activation::silu: return activate_as<Activation::silu, order>(out, x, a.parameter);
    case Activation::gelu: return activate_as<Activation::gelu, order>(out, x, a.parameter);
    case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh, order>(out, x, a.parameter);
    case Activation::elu: return activate_as<Activation::elu, order>(out, x, a.parameter);
    case Activation::leaky_relu: return activate_as<Activation::leaky_relu, order>(out, x, a.parameter);
    case Activation::relu: return activate_as<Activation::relu, order>(out, x, a.parameter);
    default: return;  // the others are of fused programs
  }
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) forward_kernel(const TailArguments a) {
  const int64_t first = pack_of_thread() * n;
  if (first >= a.pooling.pooled) return;
  const int64_t window = window_of(a.pooling, first);
  float value[n], side[n];
  means<T>(value, a.main, window, a.pooling);
  means<T>(side, a.skip, window, a.pooling);
  activate<0>(value, value, a);
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = tail_value(value[i], side[i]);
  if (a.beta) {
    read_pack(side, static_cast<const T*>(a.fade) + first);
#pragma unroll
    for (int i = 0; i < n; ++i) value[i] = blended(*a.beta, value[i], side[i]);
  }
  write_pack(static_cast<T*>(a.out) + first, value);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) backward_kernel(const TailArguments a) {
  const int64_t first = pack_of_thread() * n;
  if (first >= a.pooling.pooled) return;
  const int64_t window = window_of(a.pooling, first);
  const float beta = a.beta ? *a.beta : 1.0f, share = 0.25f * branch_weight(beta);
  float mean[n], slope[n], value[n];
  means<T>(mean, a.main, window, a.pooling);
  read_pack(value, static_cast<const T*>(a.grad) + first);
  if (a.beta) {
    float rest[n];
#pragma unroll
    for (int i = 0; i < n; ++i) rest[i] = (1 - beta) * value[i];
    write_pack(static_cast<T*>(a.to_fade) + first, rest);
  }
  activate<1>(slope, mean, a);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] *= share;
    slope[i] *= value[i];
  }
  spread<T>(a.to_main, slope, window, a.pooling);
  spread<T>(a.to_skip, value, window, a.pooling);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads) double_backward_kernel(const TailArguments a) {
  const int64_t first = pack_of_thread() * n;
  if (first >= a.pooling.pooled) return;
  const int64_t window = window_of(a.pooling, first);
  const float beta = a.beta ? *a.beta : 1.0f, weight = branch_weight(beta), share = 0.25f * weight;
  float mean[n], by_main[n], along[n], value[n];
  means<T>(mean, a.main, window, a.pooling);
  means<T>(by_main, a.grad_main, window, a.pooling);
  means<T>(along, a.grad_skip, window, a.pooling);
  activate<1>(value, mean, a);
#pragma unroll
  for (int i = 0; i < n; ++i) along[i] = fused(value[i], by_main[i], along[i]);
  if (a.beta) {
    read_pack(value, static_cast<const T*>(a.grad_fade) + first);
#pragma unroll
    for (int i = 0; i < n; ++i) along[i] = fused(weight, along[i], (1 - beta) * value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) along[i] *= weight;
  }
  write_pack(static_cast<T*>(a.out) + first, along);
  read_pack(value, static_cast<const T*>(a.grad) + first);
  activate<2>(mean, mean, a);
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = share * value[i] * mean[i] * by_main[i];
  spread<T>(a.to_main, value, window, a.pooling);
}

}  // namespace

const char* launch_block_tail(const TailArguments& a, Stream stream) {
  dispatch(a.type, a.packs,
           [&]<class T, int n>() { launch(forward_kernel<T, n>, blocks_for(a.pooling.pooled / n), kThreads, stream, a); });
  return launch_error();
}

const char* launch_block_tail_backward(const TailArguments& a, Stream stream) {
  dispatch(a.type, a.packs,
           [&]<class T, int n>() { launch(backward_kernel<T, n>, blocks_for(a.pooling.pooled / n), kThreads, stream, a); });
  return launch_error();
}

const char* launch_block_tail_double_backward(const TailArguments& a, Stream stream) {
  dispatch(a.type, a.packs, [&]<class T, int n>() {
    launch(double_backward_kernel<T, n>, blocks_for(a.pooling.pooled / n), kThreads, stream, a);
  });
  return launch_error();
}

}  // namespace fastebm::cuda
