// The two halves of an update, for those who call them in turn: a fused program made ready, and a Langevin step.
#pragma once

#include <vector>

#include "operator.h"
#include "program.h"

namespace fastebm {

// A program that was decoded and checked for a batch. The tensors must outlive it.
class ReadyProgram {
 public:
  ReadyProgram(const ReadyProgram&) = delete;
  ReadyProgram(const Tensor& x, const Tensor& code, const std::vector<Tensor>& constants, const Tensor& workspace);
  void run(float* energies, float* gradient) const;

 private:
  ProgramJob job_{};
  std::vector<ConstantView> views_;
};

void langevin_step(Tensor out, Tensor x, Tensor gradient, Tensor schedule, Tensor key, Tensor chain_ids, std::optional<double> clamp_min,
                   std::optional<double> clamp_max, std::optional<double> gradient_clip, std::optional<double> norm_clip,
                   std::optional<Tensor> mask, std::optional<Tensor> known, std::optional<Tensor> data_target,
                   std::optional<Tensor> data_term_weight, double data_term_hinge);

}  // namespace fastebm
