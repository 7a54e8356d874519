// The two halves of an update of a chain, which chain.cpp calls in turn: a prepared fused program, and a Langevin step.
#pragma once

#include <vector>

#include "../step_options.h"
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

void langevin_step(const StepOptions& options, Tensor out, Tensor x, Tensor grad);

}  // namespace fastebm
