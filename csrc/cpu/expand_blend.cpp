// fastebm_cpp::expand_blend and its derivative: beta primal + (1 - beta) fade over tensors that lie in memory alike.
//
// Bytes: 12 an element either way in float32.
#include "../block_tail.h"
#include "dispatch.h"

namespace fastebm {
namespace {

template <class T>
struct Blend {
  ComputeType<T> beta;
  const T *primal, *fade;
  T* out;
};

template <class T, Isa isa>
FASTEBM_INLINE void blend_body(const Blend<T>& job, int64_t begin, int64_t end) {
  using C = ComputeType<T>;
  const C beta = job.beta;
  const T* __restrict primal = job.primal;
  const T* __restrict fade = job.fade;
  T* __restrict out = job.out;
  for (int64_t i = begin; i < end; ++i) out[i] = static_cast<T>(blended(beta, C(primal[i]), C(fade[i])));
}
FASTEBM_VARIANTS(blend, (const Blend<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

template <class T>
struct BlendBackward {
  ComputeType<T> beta;
  const T* grad;
  T *grad_primal, *grad_fade;
};

template <class T, Isa isa>
FASTEBM_INLINE void blend_backward_body(const BlendBackward<T>& job, int64_t begin, int64_t end) {
  using C = ComputeType<T>;
  const C beta = job.beta, rest = 1 - beta;
  const T* __restrict grad = job.grad;
  T* __restrict grad_primal = job.grad_primal;
  T* __restrict grad_fade = job.grad_fade;
  for (int64_t i = begin; i < end; ++i) {
    grad_primal[i] = static_cast<T>(beta * C(grad[i]));
    grad_fade[i] = static_cast<T>(rest * C(grad[i]));
  }
}
FASTEBM_VARIANTS(blend_backward, (const BlendBackward<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

}  // namespace

void expand_blend(Tensor out, Tensor primal, Tensor fade, Tensor beta) {
  dispatch(out, [&]<class T>() {
    const Blend<T> job{*data<const ComputeType<T>>(beta), data<const T>(primal), data<const T>(fade), data<T>(out)};
    torch::stable::parallel_for(0, out.numel(), kGrainElements, [&](int64_t begin, int64_t end) { blend<T>(job, begin, end); });
  });
}

void expand_blend_backward(Tensor grad_primal, Tensor grad_fade, Tensor grad, Tensor beta) {
  dispatch(grad, [&]<class T>() {
    const BlendBackward<T> job{*data<const ComputeType<T>>(beta), data<const T>(grad), data<T>(grad_primal), data<T>(grad_fade)};
    torch::stable::parallel_for(0, grad.numel(), kGrainElements,
                                [&](int64_t begin, int64_t end) { blend_backward<T>(job, begin, end); });
  });
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("expand_blend", TORCH_BOX(&fastebm::expand_blend));
  library.impl("expand_blend_backward", TORCH_BOX(&fastebm::expand_blend_backward));
}
