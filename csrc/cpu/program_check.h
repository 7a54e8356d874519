// What makes a fused program safe to run: every number in its code is checked before a kernel follows it.
//
// fastebm/ops/program_check.py says the rules and has them in Python. The code is a tensor that anyone may change at any time;
// so kernels run from the copy that was checked, and a call only compares the two.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <vector>

#include "program.h"

namespace fastebm {

// What a constant must be: nothing is asked where `uses` is none.
struct ConstantNeed {
  enum Use { none, weight, image } uses = none;
  std::vector<int64_t> sizes;  // of a weight exactly; of an image the least channels, height and width
};

struct Sample {
  int64_t channels = 0, height = 0, width = 0;
  bool operator==(const Sample& other) const {
    return channels == other.channels && height == other.height && width == other.width;
  }
};

struct CheckedProgram {
  std::vector<int64_t> code;
  const ProgramHeader* header;
  const BufferRow* buffers;
  const InstructionRow* instructions;
  const EpilogueRow* epilogues;
  const SegmentRow* segments;

  std::vector<ConstantNeed> constants;  // as many as there must be
  int64_t numbers = 0;                  // how many constant 0 must have at least
  int64_t workspace = 0;                // bytes of all slots
  std::vector<char> kept;               // by buffer, whether it holds every image of a chunk when the program has run
  bool loads = false, writes_gradient = false, whole_gradient = false, writes_energies = false;
  Sample sample;    // that is loaded
  Sample gradient;  // the least that is written, channels exactly
};

// The program of a code, checked now or when the same code was seen before. Throws with one line where it breaks a rule.
std::shared_ptr<const CheckedProgram> checked_program(const int64_t* code, int64_t count);
std::shared_ptr<const CheckedProgram> checked_program(const torch::stable::Tensor& code);

}  // namespace fastebm
