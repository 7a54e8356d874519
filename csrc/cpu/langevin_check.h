// What `langevin_step` asks of its tensors before it follows a pointer.
#pragma once

#include "../step_options.h"
#include "operator.h"

namespace fastebm {

// A tensor of x's shape. (batch, channel, pixel) may have any strides, any other shape is contiguous.
inline void check_like_state(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type) {
  const auto sizes = x.sizes();
  check_dtype(name, tensor, type);
  check_sizes(name, tensor, {sizes.begin(), sizes.end()});
  STD_TORCH_CHECK(x.dim() == 3 || tensor.is_contiguous(), name, " must be contiguous");
  check_memory(name, tensor);
}

inline void check_step(const StepOptions& options, const Tensor& out, const Tensor& x, const Tensor& grad) {
  STD_TORCH_CHECK(x.dim() > 0, "x must be (batch, ...), got a tensor without dimensions");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "the state must be float32 or float64");
  check_like_state("x", x, x, type);
  check_like_state("out", out, x, type);
  STD_TORCH_CHECK(!overlaps_itself(out), "out must not overlap itself");
  check_like_state("grad", grad, x, grad.scalar_type());
  const Tensor& schedule = options.schedule;
  check_contiguous("schedule", schedule, ScalarType::Float);
  STD_TORCH_CHECK((schedule.dim() == 2 || (schedule.dim() == 3 && schedule.size(1) == x.size(0))) && schedule.size(0) > 0 &&
                      schedule.size(schedule.dim() - 1) == 2,
                  "schedule must be (steps, 2) or (steps, batch, 2)");
  // x and the gradient may be where the new state goes: their elements are read before they are written. Nothing else may.
  check_apart("out", out, "schedule", schedule);
  check_apart("out", out, "key", options.key);
  check_apart("out", out, "chain_ids", options.chain_ids);
  STD_TORCH_CHECK(options.mask.has_value() == options.known.has_value(), "mask and known go together");
  if (options.mask) check_like_state("mask", *options.mask, x, ScalarType::Bool);
  if (options.lower_bounds) check_like_state("lower_bounds", *options.lower_bounds, x, type);
  if (options.upper_bounds) check_like_state("upper_bounds", *options.upper_bounds, x, type);
  if (options.known) check_like_state("known", *options.known, x, type);
  if (options.data_target) check_like_state("data_target", *options.data_target, x, type);
  const std::pair<const char*, const std::optional<Tensor>&> sides[] = {{"mask", options.mask},
                                                                        {"known", options.known},
                                                                        {"lower_bounds", options.lower_bounds},
                                                                        {"upper_bounds", options.upper_bounds},
                                                                        {"data_target", options.data_target},
                                                                        {"data_term_weight", options.data_term_weight}};
  for (const auto& [name, side] : sides)
    if (side) check_apart("out", out, name, *side);
  if (const auto& weight = options.data_term_weight) {
    check_contiguous("data_term_weight", *weight, ScalarType::Float);
    STD_TORCH_CHECK(weight->dim() == 1 && weight->numel() > 0, "data_term_weight must be (steps,)");
  }
}

}  // namespace fastebm
