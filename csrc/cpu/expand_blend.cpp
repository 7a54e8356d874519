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

// Kernels go over memory from end to end: tensors lie alike, without gaps and without overlaps.
void check_alike(const char* name, const Tensor& tensor, const Tensor& like) {
  check_dtype(name, tensor, like.scalar_type());
  const auto sizes = like.sizes();
  check_sizes(name, tensor, {sizes.begin(), sizes.end()});
  for (int64_t d = 0; d < like.dim(); ++d)
    STD_TORCH_CHECK(like.size(d) <= 1 || tensor.stride(d) == like.stride(d), name, " must lie in memory as the others do");
  const auto [begin, end] = memory_of(tensor);
  STD_TORCH_CHECK(!overlaps_itself(tensor) && end - begin == tensor.numel() * static_cast<int64_t>(tensor.element_size()), name,
                  " must lie in memory without gaps and overlaps");
  check_memory(name, tensor);
}

void check_beta(const Tensor& beta, const Tensor& like) {
  check_contiguous("beta", beta, like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(beta.numel() == 1, "beta must be one number, got ", beta.numel());
}

}  // namespace

void expand_blend(Tensor out, Tensor primal, Tensor fade, Tensor beta) {
  for (const auto& [name, tensor] : {std::pair("out", &out), std::pair("primal", &primal), std::pair("fade", &fade)}) {
    check_alike(name, *tensor, out);
    if (tensor != &out) check_apart("out", out, name, *tensor);
  }
  check_beta(beta, out);
  check_apart("out", out, "beta", beta);
  dispatch(out, [&]<class T>() {
    const Blend<T> job{*data<const ComputeType<T>>(beta), data<const T>(primal), data<const T>(fade), data<T>(out)};
    torch::stable::parallel_for(0, out.numel(), kGrainElements, [&](int64_t begin, int64_t end) { blend<T>(job, begin, end); });
  });
}

void expand_blend_backward(Tensor grad_primal, Tensor grad_fade, Tensor grad, Tensor beta) {
  for (const auto& [name, tensor] :
       {std::pair("grad", &grad), std::pair("grad_primal", &grad_primal), std::pair("grad_fade", &grad_fade)}) {
    check_alike(name, *tensor, grad);
    if (tensor != &grad) check_apart(name, *tensor, "grad", grad), check_apart(name, *tensor, "beta", beta);
  }
  check_apart("grad_primal", grad_primal, "grad_fade", grad_fade);
  check_beta(beta, grad);
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
