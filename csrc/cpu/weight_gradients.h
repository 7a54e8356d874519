// The format of tasks for gradients of weights, as fastebm/ops/weight_gradients.py describes it, and what a thread is given.
//
// weight_gradients.cpp checks tasks and divides them into units; weight_gradients_variant.h computes one unit.
#pragma once

#include "program.h"

namespace fastebm {

enum class WeightKind : int64_t { convolution, sum, product };

struct TaskRow {
  WeightKind kind;
  int64_t result, gradient_buffer, gradient_channel, out, source_buffer, source_channel, inner, height, width, kernel_y, kernel_x,
      stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, per_pixel, gradient_factor_y, gradient_factor_x,
      gradient_broadcast, source_factor_y, source_factor_x, source_broadcast, source_height, source_width;
};
constexpr int64_t kTaskFields = sizeof(TaskRow) / sizeof(int64_t);

// What all units of a call read and write.
struct WeightJob {
  const ProgramHeader* header;
  const BufferRow* buffers;
  const char* workspace;
  const float* factors;
  float* const* results;
  int64_t images;
};

// A part of one task's result, which one thread computes from all images: taps of a convolution times channels of both sides, or
// channels of a sum, or rows of one by pixel. The wide side lies along vectors, single numbers of the narrow one are multiplied by
// them: the source's channels and the gradient's, or the other way round where `exchanged`.
struct WeightUnit {
  const TaskRow* task;
  bool exchanged;
  int64_t tap, taps, narrow, narrows, wide, wides, row, rows;
  double cost;
};

// The kernels of one instruction set.
struct WeightKernels {
  int64_t vector;   // floats in a vector
  int64_t widest;   // floats of the wide side in a unit, at most
  int64_t (*memory)(const WeightJob&, const WeightUnit&);  // floats that `run` needs
  void (*run)(const WeightJob&, const WeightUnit&, float* memory);
};
WeightKernels weight_kernels_baseline();
WeightKernels weight_kernels_avx2();
WeightKernels weight_kernels_avx512();
WeightKernels weight_kernels_amx();

}  // namespace fastebm
