// The two halves of an update of a chain, which chain.cpp calls in turn: a prepared fused program, and a Langevin step.
#pragma once

#include <vector>

#include "../step_options.h"
#include "operator.h"
#include "program_check.h"

namespace fastebm {

// A program that was checked, and so were the tensors for it, which must outlive it.
class ReadyProgram {
 public:
  ReadyProgram(const ReadyProgram&) = delete;
  ReadyProgram(const Tensor& x, const Tensor& code, const std::vector<Tensor>& constants, const Tensor& workspace);
  void run(float* energies, float* gradient) const;

 private:
  std::shared_ptr<const CheckedProgram> program_;
  ProgramJob job_{};
  bool whole_ = false;  // it writes every energy and all of the gradient
  std::vector<ConstantView> views_;
};

// Refuses results of a program that have no room for `count` energies and a gradient like x, or lie where it reads.
void check_results(const Tensor& energies, int64_t count, const Tensor& gradient, const Tensor& x, const Tensor& workspace);

void langevin_step(const StepOptions& options, Tensor out, Tensor x, Tensor grad);

}  // namespace fastebm
