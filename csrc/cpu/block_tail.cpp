// fastebm_cpp::block_tail and its derivatives: pool, activate, add, blend in one pass over the images.
//
// Bytes, in float32, for each pooled pixel: 36 forward (read 4 pixels of main and of skip, write 1), 52 backward (read the
// gradient and 4 of main, write 4 of each). Pooled values go through short loops over L1 buffers, one stretch at a time.
#include "../block_tail.h"
#include "../pooling.h"
#include "dispatch.h"

namespace fastebm {
namespace {

// Pooled elements worked on at once: the buffers stay in L1.
constexpr int64_t kPooled = 512;

template <class T_>
struct TailTypes {
  using T = T_;
  using C = ComputeType<T>;
};

// Walks over pooled elements in runs whose windows are evenly spaced: a row (NCHW), or a pixel's channels (channels-last).
struct Walk {
  const Pooling& pooling;
  int64_t plane, row, pixel, channel, row_offset;

  FASTEBM_INLINE Walk(const Pooling& p, int64_t first) : pooling(p) {
    channel = first % p.inner, first /= p.inner;
    pixel = first % p.width, first /= p.width;
    row = first % p.height, plane = first / p.height;
    row_offset = plane * p.input_plane + 2 * row * p.input_row;
  }

  // Offset of the run's first window, and the length of the run; moves past it.
  FASTEBM_INLINE int64_t next(int64_t remaining, int64_t& length) {
    const Pooling& p = pooling;
    const int64_t offset = row_offset + 2 * pixel * p.inner + channel;
    if (p.inner == 1) {
      length = std::min(remaining, p.width - pixel);
      pixel += length;
    } else {
      length = std::min(remaining, p.inner - channel);
      channel += length;
      if (channel == p.inner) channel = 0, ++pixel;
    }
    if (pixel == p.width) {
      pixel = 0, row_offset += 2 * p.input_row;
      if (++row == p.height) row = 0, row_offset = ++plane * p.input_plane;
    }
    return offset;
  }
};

// Means over the windows of pooled elements [first, first + count), of several images at once, so that the memory has all
// of their rows to fetch ahead: a quarter faster than image by image in channels-last.
template <class T, class C, int n>
FASTEBM_INLINE void pool(C (&out)[n][kPooled], const T* const (&images)[n], const Pooling& pooling, int64_t first,
                         int64_t count) {
  const int64_t inner = pooling.inner, down = pooling.input_row;
  Walk walk(pooling, first);
  for (int64_t at = 0, length; at < count; at += length) {
    const int64_t offset = walk.next(count - at, length);
    if (inner == 1) {
#pragma GCC unroll 3
      for (int k = 0; k < n; ++k) {
        const T* x = images[k] + offset;
#pragma GCC ivdep
        for (int64_t i = 0; i < length; ++i)
          out[k][at + i] = window_mean(C(x[2 * i]), C(x[2 * i + down]), C(x[2 * i + 1]), C(x[2 * i + 1 + down]));
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < length; ++i) {
#pragma GCC unroll 3
        for (int k = 0; k < n; ++k) {
          const T* x = images[k] + offset + i;
          out[k][at + i] = window_mean(C(x[0]), C(x[down]), C(x[inner]), C(x[inner + down]));
        }
      }
    }
  }
}

// Writes each value twice, side by side. Two-byte values go as words of four, which vectorises better.
template <class T>
FASTEBM_INLINE void write_pairs(T* __restrict out, const T* __restrict values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == 2) {
      uint16_t bits;
      std::memcpy(&bits, values + i, sizeof bits);
      const uint32_t pair = bits * 0x10001u;
      std::memcpy(out + 2 * i, &pair, sizeof pair);
    } else {
      out[2 * i] = out[2 * i + 1] = values[i];
    }
  }
}

// Writes each value to the four pixels of its window. A trailing odd row or column is the caller's, who has zeroed it.
template <class T>
FASTEBM_INLINE void spread(T* image, const T* __restrict values, const Pooling& pooling, int64_t first, int64_t count) {
  Walk walk(pooling, first);
  for (int64_t at = 0, length; at < count; at += length) {
    T* top = image + walk.next(count - at, length);
    for (T* row : {top, top + pooling.input_row}) {
      if (pooling.inner == 1) {
        write_pairs(row, values + at, length);
      } else {
        std::copy_n(values + at, length, row);
        std::copy_n(values + at, length, row + pooling.inner);
      }
    }
  }
}

template <class C_, int order_>
struct ActivateTypes {
  using C = C_;
  static constexpr int order = order_;
};

template <Activation kind, class Types>
FASTEBM_INLINE void activate_as(typename Types::C* out, const typename Types::C* x, int64_t count, typename Types::C parameter) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = activated<kind, Types::order>(x[i], parameter);
}

// The activation or a derivative of it; `out` may be `x`. A call for each stretch, so that its loops exist once for all
// dtypes and kernels.
template <class Types, Isa isa>
FASTEBM_INLINE void activate_body(typename Types::C* out, const typename Types::C* x, int64_t count, Activation kind,
                                  typename Types::C parameter) {
  switch (kind) {
    case Activation::scaled_swish: return activate_as<Activation::scaled_swish, Types>(out, x, count, parameter);
    case Activation::silu: return activate_as<Activation::silu, Types>(out, x, count, parameter);
    case Activation::gelu: return activate_as<Activation::gelu, Types>(out, x, count, parameter);
    case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh, Types>(out, x, count, parameter);
    case Activation::elu: return activate_as<Activation::elu, Types>(out, x, count, parameter);
    case Activation::leaky_relu: return activate_as<Activation::leaky_relu, Types>(out, x, count, parameter);
    case Activation::relu: return activate_as<Activation::relu, Types>(out, x, count, parameter);
    default: return;  // the others are of fused programs
  }
}
FASTEBM_VARIANTS(activate,
                 (typename Kernel::C * out, const typename Kernel::C* x, int64_t count, Activation kind,
                  typename Kernel::C parameter),
                 (out, x, count, kind, parameter))

// What all three kernels know.
template <class Types>
struct Tail {
  using T = typename Types::T;
  using C = typename Types::C;
  Pooling pooling;
  Activation activation;
  C parameter, beta;  // beta is 1 where nothing fades
  const T* main;
};

template <class Types>
struct TailForward : Tail<Types> {
  const typename Types::T *skip, *fade;
  typename Types::T* out;
};

template <class Types, Isa isa>
FASTEBM_INLINE void tail_forward_body(const TailForward<Types>& job, int64_t begin, int64_t end) {
  using T = typename Types::T;
  using C = typename Types::C;
  alignas(64) C means[2][kPooled];
  C *main = means[0], *skip = means[1];
  const C beta = job.beta;
  for (int64_t first = begin * kPooled; first < end * kPooled; first += kPooled) {
    const int64_t count = std::min(kPooled, job.pooling.pooled - first);
    pool<T, C, 2>(means, {job.main, job.skip}, job.pooling, first, count);
    activate<ActivateTypes<C, 0>>(main, main, count, job.activation, job.parameter);
    T* __restrict out = job.out + first;
    if (job.fade) {
      const T* __restrict fade = job.fade + first;
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(blended(beta, tail_value(main[i], skip[i]), C(fade[i])));
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(tail_value(main[i], skip[i]));
    }
  }
}
FASTEBM_VARIANTS(tail_forward, (const TailForward<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

template <class Types>
struct TailBackward : Tail<Types> {
  const typename Types::T* grad;
  typename Types::T *grad_main, *grad_skip, *grad_fade;
};

template <class Types, Isa isa>
FASTEBM_INLINE void tail_backward_body(const TailBackward<Types>& job, int64_t begin, int64_t end) {
  using T = typename Types::T;
  using C = typename Types::C;
  alignas(64) C means[1][kPooled];
  C* slope = means[0];
  alignas(64) T to_main[kPooled], to_skip[kPooled];
  const C share = C(0.25) * branch_weight(job.beta), rest = 1 - job.beta;
  for (int64_t first = begin * kPooled; first < end * kPooled; first += kPooled) {
    const int64_t count = std::min(kPooled, job.pooling.pooled - first);
    pool<T, C, 1>(means, {job.main}, job.pooling, first, count);
    activate<ActivateTypes<C, 1>>(slope, slope, count, job.activation, job.parameter);
    const T* __restrict grad = job.grad + first;
    for (int64_t i = 0; i < count; ++i) {
      const C one = share * C(grad[i]);
      to_skip[i] = static_cast<T>(one);
      to_main[i] = static_cast<T>(one * slope[i]);
    }
    spread(job.grad_main, to_main, job.pooling, first, count);
    spread(job.grad_skip, to_skip, job.pooling, first, count);
    if (job.grad_fade) {
      T* __restrict grad_fade = job.grad_fade + first;
      for (int64_t i = 0; i < count; ++i) grad_fade[i] = static_cast<T>(rest * C(grad[i]));
    }
  }
}
FASTEBM_VARIANTS(tail_backward, (const TailBackward<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

template <class Types>
struct TailDoubleBackward : Tail<Types> {
  const typename Types::T *grad_main, *grad_skip, *grad_fade, *grad;
  typename Types::T *out_grad, *out_main;
};

template <class Types, Isa isa>
FASTEBM_INLINE void tail_double_backward_body(const TailDoubleBackward<Types>& job, int64_t begin, int64_t end) {
  using T = typename Types::T;
  using C = typename Types::C;
  alignas(64) C means[3][kPooled], slope[kPooled];
  C *main = means[0], *by_main = means[1], *by_skip = means[2];
  alignas(64) T to_main[kPooled];
  const C weight = branch_weight(job.beta), share = C(0.25) * weight, rest = 1 - job.beta;
  for (int64_t first = begin * kPooled; first < end * kPooled; first += kPooled) {
    const int64_t count = std::min(kPooled, job.pooling.pooled - first);
    pool<T, C, 3>(means, {job.main, job.grad_main, job.grad_skip}, job.pooling, first, count);
    activate<ActivateTypes<C, 1>>(slope, main, count, job.activation, job.parameter);
    activate<ActivateTypes<C, 2>>(main, main, count, job.activation, job.parameter);
    const T* __restrict grad = job.grad + first;
    for (int64_t i = 0; i < count; ++i) to_main[i] = static_cast<T>(share * C(grad[i]) * main[i] * by_main[i]);
    spread(job.out_main, to_main, job.pooling, first, count);
    T* __restrict out_grad = job.out_grad + first;
    if (job.grad_fade) {
      const T* __restrict by_fade = job.grad_fade + first;
      for (int64_t i = 0; i < count; ++i)
        out_grad[i] = static_cast<T>(fused(weight, fused(slope[i], by_main[i], by_skip[i]), rest * C(by_fade[i])));
    } else {
      for (int64_t i = 0; i < count; ++i) out_grad[i] = static_cast<T>(weight * fused(slope[i], by_main[i], by_skip[i]));
    }
  }
}
FASTEBM_VARIANTS(tail_double_backward, (const TailDoubleBackward<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

template <class Types>
Tail<Types> tail(const Tensor& main, const Tensor& pooled, const std::optional<Tensor>& beta, int64_t activation,
                 double parameter) {
  using C = typename Types::C;
  return {pooling_of(main, pooled), static_cast<Activation>(activation), static_cast<C>(parameter),
          beta ? *data<const C>(*beta) : C(1), data<const typename Types::T>(main)};
}

// Runs a kernel over stretches of pooled elements, each of which touches four times as many pixels.
template <class Job>
void over_stretches(void (*kernel)(const Job&, int64_t, int64_t), const Job& job) {
  const int64_t tasks = (job.pooling.pooled + kPooled - 1) / kPooled;
  torch::stable::parallel_for(0, tasks, grain(tasks, 4 * kPooled),
                              [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// What a kernel takes besides main: images like it or pooled ones; null where there is none.
struct TailTensor {
  const char* name;
  const Tensor* tensor;
  bool pooled, written;
};

const Tensor* given(const std::optional<Tensor>& x) { return x ? &*x : nullptr; }

// All lie row by row or all channels-last, as pooling_of sees it in main.
void check_format(const char* name, const Tensor& x, bool channels_last) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t rows[4] = {c * h * w, h * w, w, 1}, last[4] = {c * h * w, 1, w * c, c};
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(x.numel() == 0 || x.size(d) <= 1 || x.stride(d) == (channels_last ? last : rows)[d], name,
                    " must be contiguous in the memory format of main");
  check_memory(name, x);
}

void check_tail(const Tensor& main, std::initializer_list<TailTensor> others, const std::optional<Tensor>& beta,
                int64_t activation) {
  STD_TORCH_CHECK(main.dim() == 4, "main must be (batch, channels, height, width), got ", main.dim(), " dimensions");
  const std::vector<int64_t> full = {main.size(0), main.size(1), main.size(2), main.size(3)};
  const std::vector<int64_t> pooled = {full[0], full[1], full[2] / 2, full[3] / 2};
  const bool channels_last = main.size(1) > 1 && main.stride(1) == 1;
  check_format("main", main, channels_last);
  for (const TailTensor& one : others) {
    if (one.tensor == nullptr) continue;
    check_dtype(one.name, *one.tensor, main.scalar_type());
    check_sizes(one.name, *one.tensor, one.pooled ? pooled : full);
    check_format(one.name, *one.tensor, channels_last);
    if (!one.written) continue;
    check_apart(one.name, *one.tensor, "main", main);
    if (beta) check_apart(one.name, *one.tensor, "beta", *beta);
    for (const TailTensor& other : others)
      if (other.tensor != nullptr && &other != &one) check_apart(one.name, *one.tensor, other.name, *other.tensor);
  }
  if (beta) {
    check_contiguous("beta", *beta, main.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    STD_TORCH_CHECK(beta->numel() == 1, "beta must be one number, got ", beta->numel());
  }
  STD_TORCH_CHECK((activation >= 0 && activation <= static_cast<int64_t>(Activation::relu)) ||
                      activation == static_cast<int64_t>(Activation::scaled_swish),
                  "the block tail has no activation number ", activation);
}

}  // namespace

void block_tail(Tensor out, Tensor main, Tensor skip, std::optional<Tensor> fade, std::optional<Tensor> beta, int64_t activation,
                double parameter) {
  check_tail(main, {{"out", &out, true, true}, {"skip", &skip, false, false}, {"fade", given(fade), true, false}}, beta,
             activation);
  dispatch(main, [&]<class T>() {
    using Types = TailTypes<T>;
    const TailForward<Types> job{tail<Types>(main, out, beta, activation, parameter), data<const T>(skip), data<const T>(fade),
                                 data<T>(out)};
    over_stretches(tail_forward<Types>, job);
  });
}

void block_tail_backward(Tensor grad_main, Tensor grad_skip, std::optional<Tensor> grad_fade, Tensor grad, Tensor main,
                         std::optional<Tensor> beta, int64_t activation, double parameter) {
  check_tail(main,
             {{"grad_main", &grad_main, false, true},
              {"grad_skip", &grad_skip, false, true},
              {"grad_fade", given(grad_fade), true, true},
              {"grad", &grad, true, false}},
             beta, activation);
  dispatch(main, [&]<class T>() {
    using Types = TailTypes<T>;
    const TailBackward<Types> job{tail<Types>(main, grad, beta, activation, parameter), data<const T>(grad), data<T>(grad_main),
                                  data<T>(grad_skip), data<T>(grad_fade)};
    over_stretches(tail_backward<Types>, job);
  });
}

void block_tail_double_backward(Tensor out_grad, Tensor out_main, Tensor grad_main, Tensor grad_skip,
                                std::optional<Tensor> grad_fade, Tensor grad, Tensor main, std::optional<Tensor> beta,
                                int64_t activation, double parameter) {
  check_tail(main,
             {{"out_grad", &out_grad, true, true},
              {"out_main", &out_main, false, true},
              {"grad_main", &grad_main, false, false},
              {"grad_skip", &grad_skip, false, false},
              {"grad_fade", given(grad_fade), true, false},
              {"grad", &grad, true, false}},
             beta, activation);
  dispatch(main, [&]<class T>() {
    using Types = TailTypes<T>;
    const TailDoubleBackward<Types> job{tail<Types>(main, grad, beta, activation, parameter),
                                        data<const T>(grad_main),
                                        data<const T>(grad_skip),
                                        data<const T>(grad_fade),
                                        data<const T>(grad),
                                        data<T>(out_grad),
                                        data<T>(out_main)};
    over_stretches(tail_double_backward<Types>, job);
  });
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("block_tail", TORCH_BOX(&fastebm::block_tail));
  library.impl("block_tail_backward", TORCH_BOX(&fastebm::block_tail_backward));
  library.impl("block_tail_double_backward", TORCH_BOX(&fastebm::block_tail_double_backward));
}
