// The format of a lane program, as fastebm/ops/lanes.py describes it, and what one worker needs to run it.
//
// A lane program computes the energy and the gradient of one sample: every number of it has an address in an arena. A worker
// takes `width` samples through the program together, so that an address holds `width` floats, one for each sample. Instructions
// then are loops over plain arrays, whatever the shapes, strides and gathers of the energy are: those are tables of addresses.
//
// The value of a number does not depend on the width: elementwise operations have the same bits in every lane, and sums run in
// one fixed order.
#pragma once

#include <cstdint>

#include "../lane_math.h"

namespace fastebm {

enum class LaneKind : int64_t { map, product, pair_product, scan };

enum class LaneOp : int64_t {
  copy, add, subtract, multiply, divide, negate, multiply_add, add_number, multiply_number, number_minus, number_over,
  square, reciprocal, square_root, reciprocal_root, absolute, sign, floor, ceil, round, truncate,
  exp, expm1, log, log1p, sin, cos, tanh, sigmoid, softplus, erf, atan, atan2, power, silu,
  minimum, maximum, minimum_number, maximum_number, power_number,
  less, less_equal, equal, not_equal, greater, greater_equal, less_number, less_equal_number, equal_number, not_equal_number,
  greater_number, greater_equal_number, select, logical_and, logical_or, logical_not, is_nan, remainder, round_bfloat16,
  count_
};

enum class LaneOutput : int64_t { store, sum, maximum, minimum, product };

struct LaneHeader {
  int64_t version, sample, arena, instructions, operands, micros, outputs, tables, constants, energy, gradient, registers;
  int64_t conditions;  // numbers behind the sample's, which are only read
  int64_t unused[3];
};

// map:          index space of `outer` x `inner` numbers; operands, micros and outputs by their first and their count.
// product:      out(row, column) = bias(column) + sum over k of arena(x + row_table + k_table) * weight(k, column).
// pair_product: out(b, i, j) = sum over k of arena(left(b, i) + left_k) * arena(right(b, j) + right_k).
// scan:         running sums over `inner`.
// Tables are places in the tensor of tables; -1 stands for 0, 1, 2, ...
struct LaneInstruction {
  LaneKind kind;
  int64_t outer, inner, first_operand, operands, first_micro, micros, first_output, outputs;
  int64_t rows, columns, depth, source, row_table, k_table, target, target_row_table, target_column_table, weight, bias;
  int64_t other, other_table, other_k_table, batch;
};

enum class LaneSpace : int64_t { arena, constant, number };

struct LaneOperand {
  LaneSpace space;
  int64_t base, table;  // -1: consecutive
};

struct LaneMicro {
  LaneOp op;
  int64_t target, a, b, c, number;  // registers; the bits of a float
};

struct LaneOutputRow {
  LaneOutput kind;
  int64_t source, base, table;
};

struct LaneProgram {
  const LaneHeader* header;
  const LaneInstruction* instructions;
  const LaneOperand* operands;
  const LaneMicro* micros;
  const LaneOutputRow* outputs;
  const int32_t* tables;
  const int64_t* direct;  // for each micro-operation the output that it may write in place, or -1
  const float* constants;
};

// Numbers of a strip: what a micro-operation works on at once, so that all registers of an instruction stay in L1.
constexpr int64_t kStrip = 256;
constexpr int64_t kMaxRegisters = 64;
// The width is 1 or a multiple of kLaneGroup.
constexpr int64_t kLaneGroup = 16, kMaxWidth = 256;
// Partial sums of a reduction: element j of a row goes to the sum j % 8.
constexpr int64_t kPartials = 8;
// Reductions of one instruction, each with partial sums of its own.
constexpr int64_t kMaxReductions = 8;
// Columns of a packed panel of a product's weight: (panel, depth, 16).
constexpr int64_t kLanePanel = 16;

// One worker's memory behind its arena: registers and partial sums.
constexpr int64_t kLaneScratch = kMaxRegisters * kStrip + kMaxReductions * kPartials * kMaxWidth;

constexpr int64_t kLaneRow = 64;  // the elements of a single sample that are updated together
// Squares are summed as langevin.cpp does: element e goes to the sum e % 1024, and these are added in halves.
constexpr int64_t kFoldLanes = 1024, kFoldLevels = 11;

// What an update of the chains in a block needs. Arrays (row) hold a number for each lane; a single sample has the same number
// in all kLaneRow of them, because its elements take the lanes. Planes hold (sample, width) numbers; null: the option is off.

struct LaneUpdate {
  int64_t seed, step;
  const uint32_t *ids_low, *ids_high;     // row
  float *step_size, *noise_std;           // row
  bool drifts;                            // whether the gradient is followed
  bool noisy, every_noisy;                // whether any chain, and whether every one, draws noise
  bool clips, clips_norm, clamps, pulls;  // grad_clip, grad_norm_clip, clamp, data term
  float grad_clip, grad_norm_clip, clamp_min, clamp_max, data_term_weight, data_term_hinge;
  const float *target, *lower, *upper, *mask, *known;  // planes
  float *scale, *weight;  // row: of the gradient by its norm, and of the data term
  float *noise, *drift;   // 4 rows, a row
  float* sums;            // kFoldLevels rows
};
// Rows of memory that an update takes, each of kMaxWidth numbers.
constexpr int64_t kUpdateRows = 11 + kFoldLevels;

// What samplers that keep energies need of a block besides. Arrays (row) hold a number for each lane, planes (sample, width).
struct LaneMove {
  LaneUpdate noise;                                // where its ids and step say; its rows step_size and noise_std are MALA's
  const uint32_t *acceptance, *begin, *end, *refresh;  // row: ids_high of the streams of tests, O steps, and fresh velocities
  float *x, *gradient, *energy;                    // plane, plane, row: the state that is kept
  float *velocity, *unfolded;                      // plane; the proposal before walls mirrored it
  const float *inverse_mass, *mask;                // plane, or null
  bool walled;
  float low, high;
  float *h, *decay, *sigma, *h_before, *decay_before, *sigma_before;  // row: the schedule of this step and the one before
  float* heat;                                     // row: sqrt(temperature)
  double *temperature, *work, *log_ratio;          // row
  float* rejected;                                 // row: 1 where a proposal is outside of the walls
  bool* accepted;                                  // row
  float* taken;                                    // row: 1 where a proposal is accepted
  double* sums;                                    // kFoldLevels rows
};

struct LaneKernels {
  void (*run)(const LaneProgram&, float* arena, int64_t width);
  void (*update)(const LaneProgram&, float* arena, int64_t width, const LaneUpdate&);
  void (*propose)(const LaneProgram&, float* arena, int64_t width, const LaneMove&);
  void (*test_proposal)(const LaneProgram&, float* arena, int64_t width, const LaneMove&);
  void (*refresh)(const LaneProgram&, float* arena, int64_t width, const LaneMove&);
  void (*kinetic)(const LaneProgram&, float* arena, int64_t width, const LaneMove&, bool halves, bool close, bool open, bool counted);
  void (*test_trajectory)(const LaneProgram&, float* arena, int64_t width, const LaneMove&);
};

LaneKernels lane_kernels_baseline();
#if defined(__x86_64__)
LaneKernels lane_kernels_avx2();
LaneKernels lane_kernels_avx512();
#endif

}  // namespace fastebm
