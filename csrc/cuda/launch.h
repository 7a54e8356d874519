// The arguments of the CUDA operators as plain structs, which register.cpp fills from torch's tensors.
//
// No torch header and no CUDA header here, so that kernels compile in seconds and the launchers in any compiler. A launcher
// returns null, or what CUDA says is wrong. Keys, schedules, chain ids and weights are read on the device: nothing waits for the
// GPU, and a captured launch can be replayed at a later step.
#pragma once

#include <cstdint>

#include "../pooling.h"

struct CUstream_st;

namespace fastebm::cuda {

using Stream = CUstream_st*;

enum class Type { float32, bfloat16, float16 };

// Where noise falls: int64 (seed, step, schedule index), and the id of the first chain or a list of ids.
struct Address {
  const int64_t* key;
  const int64_t* chain_ids;
  bool listed;
};

// normal.cu, uniform.cu
// ----------------------------------------------------------------------------------------------------------

struct FillArguments {
  void* out;
  Type type;
  bool vectors;  // every quad of every chain can be stored at once
  int64_t batch, elements, stream;
  Address address;
};

const char* launch_normal(const FillArguments& arguments, Stream stream);
const char* launch_uniform(const FillArguments& arguments, Stream stream);

// langevin.cu
// --------------------------------------------------------------------------------------------------------------------

// One tensor seen as (batch, channel, pixel). `vectors`: contiguous, chains of whole quads, aligned, so that a quad is one
// access.
struct Image {
  void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, pixel_stride = 1;
  bool vectors = false;
};

struct LangevinArguments {
  Image out, x, grad, lower_bounds, upper_bounds, mask, known, data_target;
  Type grad_type;
  int64_t batch, channels, pixels;
  const float* schedule;  // (steps, 2), or (steps, batch, 2) where per_chain
  int64_t schedule_rows;
  bool per_chain;
  const float* data_term_weight;  // (weight_rows,), or null
  int64_t weight_rows;
  float* factors;  // room for (batch, 2), or null where there is neither norm clip nor hinge
  Address address;
  // Limits that are not wanted are infinite.
  float clamp_min, clamp_max, grad_clip, grad_norm_clip;
  float data_term_hinge;
};

const char* launch_langevin_step(const LangevinArguments& arguments, Stream stream);

// block_tail.cu
// ------------------------------------------------------------------------------------------------------------------

// Tensors of the type that lie alike, all of them contiguous in one format. A pointer that a kernel has no use for is null.
struct TailArguments {
  Type type;
  bool packs;  // rows of windows can be read 16 bytes at once
  Pooling pooling;
  int64_t activation;
  float parameter;
  const float* beta;  // null where nothing fades
  const void *main, *skip, *fade, *grad, *grad_main, *grad_skip, *grad_fade;
  void *out, *to_main, *to_skip, *to_fade;
};

const char* launch_block_tail(const TailArguments& arguments, Stream stream);
const char* launch_block_tail_backward(const TailArguments& arguments, Stream stream);
const char* launch_block_tail_double_backward(const TailArguments& arguments, Stream stream);

// expand_blend.cu
// ----------------------------------------------------------------------------------------------------------------

struct BlendArguments {
  Type type;
  bool packs;  // whole 16-byte packs, aligned
  int64_t count;
  const float* beta;
  const void *primal, *fade;
  void* out;
};

struct BlendBackwardArguments {
  Type type;
  bool packs;
  int64_t count;
  const float* beta;
  const void* grad;
  void *grad_primal, *grad_fade;
};

const char* launch_expand_blend(const BlendArguments& arguments, Stream stream);
const char* launch_expand_blend_backward(const BlendBackwardArguments& arguments, Stream stream);

}  // namespace fastebm::cuda
