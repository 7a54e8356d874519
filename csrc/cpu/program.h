// The format of a fused program, as fastebm/ops/instructions.py describes it, and the state of one worker.
//
// program.cpp decodes a program once a call and divides the images among workers; program_variant.h runs its instructions.
#pragma once

#include <cstdint>

#include "../activations.h"

namespace fastebm {

enum class Layout : int64_t { plain, panels, tiles, pairs };
enum class Kind : int64_t { load, gather, convolution, pool, log_sum_exp, softmax, first_maximum };
enum class EpilogueOp : int64_t {
  add_constant,
  multiply_constant,
  scale,
  add,
  multiply,
  activate,
  activate_keeping,
  slope,
  store,
  store_gradient,
  store_energies
};

struct ProgramHeader {
  int64_t version, buffers, instructions, epilogues, segments;
  Layout layout;
  int64_t panel, bytes, chunk, slot, workers, team, unused[4];
};

struct BufferRow {
  int64_t channels, height, width, bytes, images, margin, offset, pixel_stride, row_stride, image_stride;
};

struct InstructionRow {
  Kind kind;
  int64_t source, source_channel, source_channels, channels, height, width, start_y, start_x, step_y, step_x, kernel_y, kernel_x,
      stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, constant, first, count, broadcast;
};

// Whether all taps of a convolution of pairs are columns of one panel: fastebm/ops/instructions.py has the same rule.
inline bool taps_are_outputs(const InstructionRow& i) {
  constexpr int64_t kColumns = 32, kReach = 16;
  return i.kernel_y <= kColumns && i.kernel_x <= kColumns && i.channels <= kColumns && i.kernel_y * i.kernel_x > 1 &&
         i.kernel_y * i.kernel_x * i.channels <= kColumns && i.stride_y == 1 && i.stride_x == 1 && i.dilation_y <= kReach &&
         i.dilation_x <= kReach && (i.kernel_y - 1) * i.dilation_y < kReach && (i.kernel_x - 1) * i.dilation_x < kReach;
}

struct EpilogueRow {
  EpilogueOp op;
  int64_t buffer, channel, factor_y, factor_x, number;
  Activation activation;
  int64_t of_result, broadcast;
};

struct SegmentRow {
  int64_t first, count, images;
};

struct ConstantView {
  const void* data;
  int64_t height, width, channels;  // of a constant image
};

struct ProgramJob {
  const ProgramHeader* header;
  const BufferRow* buffers;
  const InstructionRow* instructions;
  const EpilogueRow* epilogues;
  const SegmentRow* segments;
  const ConstantView* constants;
  const float* numbers;
  const float* x;  // (batch, channels, height, width)
  float* energies;
  float* gradient;
  int64_t batch, sample, plane, width;  // numbers of one sample, of one of its channels, and of a row
  char* workspace;
};

// What one worker is at: its slot, the first images of its chunk and of its segment, and its share of every instruction.
struct Worker {
  const ProgramJob* job;
  char* slot;
  int64_t chunk_start, segment_start, part, parts;
};

constexpr int64_t kDense = 4;        // numbers of a pixel with few channels
constexpr int64_t kDenseMargin = 8;  // pixels of zeros behind their rows
constexpr int64_t kBlock = 32;       // pixels and channels of a block that an epilogue works on

// Runs one instruction on images [begin, end).
using Execute = void (*)(const Worker&, const InstructionRow&, int64_t begin, int64_t end);
void execute_baseline(const Worker&, const InstructionRow&, int64_t begin, int64_t end);
void execute_avx2(const Worker&, const InstructionRow&, int64_t begin, int64_t end);
void execute_avx512(const Worker&, const InstructionRow&, int64_t begin, int64_t end);
void execute_avx512_bf16(const Worker&, const InstructionRow&, int64_t begin, int64_t end);
void execute_amx(const Worker&, const InstructionRow&, int64_t begin, int64_t end);

}  // namespace fastebm
