// The options of a Langevin update, as fastebm/ops/options.py lists them, and how operators receive them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastebm {

struct StepOptions {
  torch::stable::Tensor schedule, key, chain_ids;
  std::optional<double> clamp_min, clamp_max, grad_clip, grad_norm_clip;
  std::optional<torch::stable::Tensor> lower_bounds, upper_bounds, mask, known, data_target, data_term_weight;
  double data_term_hinge;
};

// WithStepOptions<&f>::call is f(options, front...) with the arguments that a schema lists: first `front`, then every option.
// TORCH_BOX needs such a function, because it converts one argument at a time.
template <auto function>
struct WithStepOptions;

template <class... Front, void (*function)(const StepOptions&, Front...)>
struct WithStepOptions<function> {
  static void call(Front... front, torch::stable::Tensor schedule, torch::stable::Tensor key, torch::stable::Tensor chain_ids,
                   std::optional<double> clamp_min, std::optional<double> clamp_max, std::optional<double> grad_clip,
                   std::optional<double> grad_norm_clip, std::optional<torch::stable::Tensor> lower_bounds,
                   std::optional<torch::stable::Tensor> upper_bounds, std::optional<torch::stable::Tensor> mask,
                   std::optional<torch::stable::Tensor> known, std::optional<torch::stable::Tensor> data_target,
                   std::optional<torch::stable::Tensor> data_term_weight, double data_term_hinge) {
    const StepOptions options{schedule,     key,          chain_ids, clamp_min, clamp_max,   grad_clip,        grad_norm_clip,
                              lower_bounds, upper_bounds, mask,      known,     data_target, data_term_weight, data_term_hinge};
    function(options, front...);
  }
};

}  // namespace fastebm
