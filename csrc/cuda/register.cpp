// fastebm_cuda::*: torch's tensors become the plain structs of launch.h, on the tensors' device and its current stream.
//
// The Python side (fastebm/ops) allocates outputs and checks shapes, dtypes and devices with messages for users.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "../step_options.h"
#include "launch.h"

namespace fastebm::cuda {
namespace {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "no CUDA stream for device ", tensor.get_device_index());
  return static_cast<Stream>(stream);
}

// Runs launch(stream) on the tensor's device and raises what CUDA finds wrong.
template <class Launch>
void on_device_of(const Tensor& tensor, const char* name, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const char* error = launch(current_stream(tensor));
  STD_TORCH_CHECK(error == nullptr, "fastebm_cuda::", name, " could not be launched: ", error);
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "CUDA operators take float32, bfloat16 or float16");
  }
}

// True where every four consecutive elements of every chain can be read and written at once.
bool holds_vectors(const Tensor& tensor, int64_t elements) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  return elements % 4 == 0 && tensor.is_contiguous() && address % (4 * tensor.element_size()) == 0;
}

Address address_of(const Tensor& key, const Tensor& chain_ids) {
  STD_TORCH_CHECK(key.numel() == 3 && key.is_contiguous(), "key needs 3 contiguous numbers (seed, step, schedule index)");
  STD_TORCH_CHECK(chain_ids.is_contiguous(), "chain_ids must be contiguous");
  return {static_cast<const int64_t*>(key.const_data_ptr()), static_cast<const int64_t*>(chain_ids.const_data_ptr()),
          chain_ids.numel() > 1};
}

// What `Tiling` counts in 32 bits.
void check_counts(int64_t batch, int64_t elements) {
  STD_TORCH_CHECK(batch <= int64_t{1} << 31 && elements <= int64_t{1} << 33,
                  "CUDA operators take at most 2^31 chains of 2^33 elements, got ", batch, " of ", elements);
}

// normal, uniform
// ----------------------------------------------------------------------------------------------------------------

void fill(const char* name, const char* (*launch)(const FillArguments&, Stream), const Tensor& out, const Tensor& key,
          const Tensor& chain_ids, int64_t stream) {
  if (out.numel() == 0) return;
  const int64_t batch = out.size(0), elements = out.numel() / batch;
  check_counts(batch, elements);
  const FillArguments arguments{out.mutable_data_ptr(),    type_of(out), holds_vectors(out, elements), batch, elements, stream,
                                address_of(key, chain_ids)};
  on_device_of(out, name, [&](Stream on) { return launch(arguments, on); });
}

void normal(Tensor out, Tensor key, Tensor chain_ids, int64_t stream) {
  fill("normal", &launch_normal, out, key, chain_ids, stream);
}

void uniform(Tensor out, Tensor key, Tensor chain_ids, int64_t stream) {
  fill("uniform", &launch_uniform, out, key, chain_ids, stream);
}

// langevin_step
// ------------------------------------------------------------------------------------------------------------------

// As fastebm.ops.langevin.images gives tensors: (batch, channel, pixel) of any strides, or contiguous of any shape.
Image image(const Tensor& x) {
  const int64_t elements = x.numel() / x.size(0);
  void* data = const_cast<void*>(x.const_data_ptr());
  if (x.is_contiguous()) return {data, elements, x.dim() == 3 ? x.size(2) : elements, 1, holds_vectors(x, elements)};
  STD_TORCH_CHECK(x.dim() == 3, "a tensor that is not contiguous must be (batch, channel, pixel), got ", x.dim(), " dimensions");
  return {data, x.stride(0), x.stride(1), x.stride(2), false};
}

Image image(const std::optional<Tensor>& x) { return x.has_value() ? image(*x) : Image{}; }

float limit(const std::optional<double>& value, float otherwise) {
  return value.has_value() ? static_cast<float>(*value) : otherwise;
}

void langevin_step(const StepOptions& options, Tensor out, Tensor x, Tensor grad) {
  if (x.numel() == 0) return;
  LangevinArguments a{};
  a.out = image(out), a.x = image(x), a.grad = image(grad);
  a.lower_bounds = image(options.lower_bounds), a.upper_bounds = image(options.upper_bounds);
  a.mask = image(options.mask), a.known = image(options.known), a.data_target = image(options.data_target);
  a.grad_type = type_of(grad);
  a.batch = x.size(0);
  a.channels = x.dim() == 3 ? x.size(1) : 1;
  a.pixels = x.numel() / a.batch / a.channels;
  check_counts(a.batch, a.channels * a.pixels);
  a.schedule = static_cast<const float*>(options.schedule.const_data_ptr());
  a.schedule_rows = options.schedule.size(0);
  a.per_chain = options.schedule.dim() == 3;
  a.address = address_of(options.key, options.chain_ids);
  a.clamp_min = limit(options.clamp_min, -INFINITY), a.clamp_max = limit(options.clamp_max, INFINITY);
  a.grad_clip = limit(options.grad_clip, INFINITY), a.grad_norm_clip = limit(options.grad_norm_clip, INFINITY);
  if (const auto& weights = options.data_term_weight) {
    a.data_term_weight = static_cast<const float*>(weights->const_data_ptr());
    a.weight_rows = weights->size(0);
  }
  a.data_term_hinge = static_cast<float>(options.data_term_hinge);
  std::optional<Tensor> factors;
  if (options.grad_norm_clip || (options.data_target && options.data_term_hinge > 0)) {
    factors = torch::stable::new_empty(x, {2 * a.batch});
    a.factors = static_cast<float*>(factors->mutable_data_ptr());
  }
  on_device_of(x, "langevin_step", [&](Stream on) { return launch_langevin_step(a, on); });
}

// block_tail, expand_blend
// -------------------------------------------------------------------------------------------------------

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

const void* data(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

void* room(const std::optional<Tensor>& x) { return x ? x->mutable_data_ptr() : nullptr; }

// What the three kernels share; `packs` is settled by on_packs, once all pointers are there.
TailArguments tail(const Tensor& main, const Tensor& pooled, const std::optional<Tensor>& beta, int64_t activation,
                   double parameter) {
  TailArguments a{};
  a.type = type_of(main);
  a.pooling = pooling_of(main, pooled);
  a.activation = activation, a.parameter = static_cast<float>(parameter);
  a.beta = static_cast<const float*>(data(beta));
  a.main = main.const_data_ptr();
  return a;
}

void on_packs(const char* name, const char* (*launch)(const TailArguments&, Stream), const Tensor& main, TailArguments a) {
  if (a.pooling.pooled == 0) return;
  const int64_t pack = 16 / static_cast<int64_t>(main.element_size());
  a.packs = (a.pooling.inner > 1 ? a.pooling.inner : a.pooling.width) % pack == 0 && a.pooling.input_row % pack == 0;
  for (const void* read : {a.main, a.skip, a.fade, a.grad, a.grad_main, a.grad_skip, a.grad_fade})
    a.packs = a.packs && aligned(read);
  for (const void* written : {a.out, a.to_main, a.to_skip, a.to_fade}) a.packs = a.packs && aligned(written);
  on_device_of(main, name, [&](Stream on) { return launch(a, on); });
}

void block_tail(Tensor out, Tensor main, Tensor skip, std::optional<Tensor> fade, std::optional<Tensor> beta, int64_t activation,
                double parameter) {
  TailArguments a = tail(main, out, beta, activation, parameter);
  a.skip = skip.const_data_ptr(), a.fade = data(fade), a.out = out.mutable_data_ptr();
  on_packs("block_tail", &launch_block_tail, main, a);
}

void block_tail_backward(Tensor grad_main, Tensor grad_skip, std::optional<Tensor> grad_fade, Tensor grad, Tensor main,
                         std::optional<Tensor> beta, int64_t activation, double parameter) {
  TailArguments a = tail(main, grad, beta, activation, parameter);
  a.grad = grad.const_data_ptr();
  a.to_main = grad_main.mutable_data_ptr(), a.to_skip = grad_skip.mutable_data_ptr(), a.to_fade = room(grad_fade);
  on_packs("block_tail_backward", &launch_block_tail_backward, main, a);
}

void block_tail_double_backward(Tensor out_grad, Tensor out_main, Tensor grad_main, Tensor grad_skip,
                                std::optional<Tensor> grad_fade, Tensor grad, Tensor main, std::optional<Tensor> beta,
                                int64_t activation, double parameter) {
  TailArguments a = tail(main, grad, beta, activation, parameter);
  a.grad = grad.const_data_ptr(), a.grad_main = grad_main.const_data_ptr(), a.grad_skip = grad_skip.const_data_ptr();
  a.grad_fade = data(grad_fade);
  a.out = out_grad.mutable_data_ptr(), a.to_main = out_main.mutable_data_ptr();
  on_packs("block_tail_double_backward", &launch_block_tail_double_backward, main, a);
}

void expand_blend(Tensor out, Tensor primal, Tensor fade, Tensor beta) {
  const int64_t count = out.numel();
  if (count == 0) return;
  BlendArguments a{type_of(out),
                   false,
                   count,
                   static_cast<const float*>(beta.const_data_ptr()),
                   primal.const_data_ptr(),
                   fade.const_data_ptr(),
                   out.mutable_data_ptr()};
  a.packs =
      count % (16 / static_cast<int64_t>(out.element_size())) == 0 && aligned(a.primal) && aligned(a.fade) && aligned(a.out);
  on_device_of(out, "expand_blend", [&](Stream on) { return launch_expand_blend(a, on); });
}

void expand_blend_backward(Tensor grad_primal, Tensor grad_fade, Tensor grad, Tensor beta) {
  const int64_t count = grad.numel();
  if (count == 0) return;
  BlendBackwardArguments a{type_of(grad),
                           false,
                           count,
                           static_cast<const float*>(beta.const_data_ptr()),
                           grad.const_data_ptr(),
                           grad_primal.mutable_data_ptr(),
                           grad_fade.mutable_data_ptr()};
  a.packs = count % (16 / static_cast<int64_t>(grad.element_size())) == 0 && aligned(a.grad) && aligned(a.grad_primal) &&
            aligned(a.grad_fade);
  on_device_of(grad, "expand_blend_backward", [&](Stream on) { return launch_expand_blend_backward(a, on); });
}

}  // namespace
}  // namespace fastebm::cuda

// The compute capabilities that this library holds code for, as fastebm/build_extension.py asked for them.
#if !defined(FASTEBM_CUDA_IMAGES)
#define FASTEBM_CUDA_IMAGES "unknown"
#endif
extern "C" __attribute__((visibility("default"))) const char* fastebm_cuda_images() { return FASTEBM_CUDA_IMAGES; }

STABLE_TORCH_LIBRARY_IMPL(fastebm_cuda, CUDA, library) {
  library.impl("normal", TORCH_BOX(&fastebm::cuda::normal));
  library.impl("uniform", TORCH_BOX(&fastebm::cuda::uniform));
  library.impl("langevin_step", TORCH_BOX(&fastebm::WithStepOptions<&fastebm::cuda::langevin_step>::call));
  library.impl("block_tail", TORCH_BOX(&fastebm::cuda::block_tail));
  library.impl("block_tail_backward", TORCH_BOX(&fastebm::cuda::block_tail_backward));
  library.impl("block_tail_double_backward", TORCH_BOX(&fastebm::cuda::block_tail_double_backward));
  library.impl("expand_blend", TORCH_BOX(&fastebm::cuda::expand_blend));
  library.impl("expand_blend_backward", TORCH_BOX(&fastebm::cuda::expand_blend_backward));
}
