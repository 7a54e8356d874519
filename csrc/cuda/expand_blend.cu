// CUDA: the Expand blend and its derivative over tensors that lie in memory alike.
//
// Bytes: 12 an element either way in float32, in 16-byte accesses where the tensors are aligned.
#include "../block_tail.h"
#include "packs.h"

namespace fastebm::cuda {
namespace {

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    blend_kernel(T* out, const T* primal, const T* fade, const float* beta, int64_t count) {
  const int64_t first = pack_of_thread() * n;
  if (first >= count) return;
  float value[n], old[n];
  read_pack(value, primal + first);
  read_pack(old, fade + first);
#pragma unroll
  for (int i = 0; i < n; ++i) value[i] = blended(*beta, value[i], old[i]);
  write_pack(out + first, value);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    blend_backward_kernel(T* grad_primal, T* grad_fade, const T* grad, const float* beta, int64_t count) {
  const int64_t first = pack_of_thread() * n;
  if (first >= count) return;
  float value[n], rest[n];
  read_pack(value, grad + first);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    rest[i] = (1 - *beta) * value[i];
    value[i] *= *beta;
  }
  write_pack(grad_primal + first, value);
  write_pack(grad_fade + first, rest);
}

template <class T, int n>
void launch_blend(const BlendArguments& a, Stream stream) {
  launch(blend_kernel<T, n>, blocks_for(a.count / n), kThreads, stream, static_cast<T*>(a.out), static_cast<const T*>(a.primal),
         static_cast<const T*>(a.fade), a.beta, a.count);
}

template <class T, int n>
void launch_blend_backward(const BlendBackwardArguments& a, Stream stream) {
  launch(blend_backward_kernel<T, n>, blocks_for(a.count / n), kThreads, stream, static_cast<T*>(a.grad_primal),
         static_cast<T*>(a.grad_fade), static_cast<const T*>(a.grad), a.beta, a.count);
}

}  // namespace

const char* launch_expand_blend(const BlendArguments& a, Stream stream) {
  dispatch(a.type, a.packs, [&]<class T, int n>() { launch_blend<T, n>(a, stream); });
  return launch_error();
}

const char* launch_expand_blend_backward(const BlendBackwardArguments& a, Stream stream) {
  dispatch(a.type, a.packs, [&]<class T, int n>() { launch_blend_backward<T, n>(a, stream); });
  return launch_error();
}

}  // namespace fastebm::cuda
