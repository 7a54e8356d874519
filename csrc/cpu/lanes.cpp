// fastebm_cpp::run_lanes and run_lane_chain: the energy and gradient of many samples side by side, once or for a whole chain.
//
// A worker takes a block of samples, one in each lane, through the program; in a chain it then draws their noise, updates them
// and goes on, so that nothing but the energies leaves its cache before the last step. Blocks don't wait for one another. Samples
// are read and written once a call.
#include "lanes.h"

#include <vector>

#include "../step_options.h"
#include "operator.h"

namespace fastebm {
namespace {

struct LaneKernels {
  RunLanes run;
  UpdateLanes update;
};

LaneKernels chosen_kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return {run_lanes_avx512, update_lanes_avx512};
  if (active_isa() == Isa::avx2) return {run_lanes_avx2, update_lanes_avx2};
#endif
  return {run_lanes_baseline, update_lanes_baseline};
}

template <class Row>
const Row* table(const int64_t*& at, int64_t rows) {
  const auto* first = reinterpret_cast<const Row*>(at);
  at += rows * static_cast<int64_t>(sizeof(Row) / sizeof(int64_t));
  return first;
}

LaneProgram decoded(const Tensor& x, const Tensor& code, const Tensor& tables, const Tensor& constants) {
  const int64_t* at = static_cast<const int64_t*>(code.const_data_ptr());
  LaneProgram program{};
  program.header = table<LaneHeader>(at, 1);
  program.instructions = table<LaneInstruction>(at, program.header->instructions);
  program.operands = table<LaneOperand>(at, program.header->operands);
  program.micros = table<LaneMicro>(at, program.header->micros);
  program.outputs = table<LaneOutputRow>(at, program.header->outputs);
  program.tables = static_cast<const int32_t*>(tables.const_data_ptr());
  program.constants = static_cast<const float*>(constants.const_data_ptr());
  return program;
}

// Samples side by side: as many as keep the arena in the caches, and no more than fill the threads.
int64_t width_for(const LaneProgram& program, int64_t batch, int64_t threads) {
  if (batch < 4) return 1;
  constexpr int64_t kCache = 96 << 10;
  int64_t width = 16;
  while (width < kMaxWidth && 2 * width * program.header->arena * int64_t{sizeof(float)} <= kCache && width * threads < batch)
    width *= 2;
  while (width < 64 && width * threads < batch && program.header->arena > kCache / 4) width *= 2;
  return width;
}

struct LaneJob {
  LaneProgram program;
  LaneKernels kernels;
  int64_t batch, sample, width;
  const float* x;
  float* x_out;
  float* energies;  // (steps, batch)
  float* gradient;
  int64_t steps;
  const StepOptions* options;
  Key key;
  const ChainIds* ids;
};

void load_block(const LaneJob& job, float* arena, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t e = 0; e < job.sample; ++e)
    for (int64_t l = 0; l < job.width; ++l) arena[e * job.width + l] = job.x[(first + std::min(l, count - 1)) * job.sample + e];
}

void store_block(const LaneJob& job, const float* from, float* to, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t e = 0; e < job.sample; ++e) to[(first + l) * job.sample + e] = from[e * job.width + l];
}

void run_block(const LaneJob& job, float* arena, float* extra, int64_t first) {
  const int64_t width = job.width, count = std::min(width, job.batch - first);
  load_block(job, arena, first);
  const float* energy = arena + job.program.header->energy * width;
  if (!job.options) {
    job.kernels.run(job.program, arena, width);
    for (int64_t l = 0; l < count; ++l) job.energies[first + l] = energy[l];
    store_block(job, arena + job.program.header->gradient * width, job.gradient, first);
    return;
  }
  const StepOptions& options = *job.options;
  float *eta = extra, *sigma = extra + kMaxWidth, *noise = extra + 2 * kMaxWidth;
  std::vector<int64_t> ids(width);
  for (int64_t l = 0; l < width; ++l) ids[l] = (*job.ids)[first + std::min(l, count - 1)];
  const auto* schedule = static_cast<const float*>(options.schedule.const_data_ptr());
  const bool per_chain = options.schedule.dim() == 3;
  LaneUpdate update{};
  update.seed = job.key.seed;
  update.ids = ids.data();
  update.step_size = eta;
  update.noise_std = sigma;
  update.noise = noise;
  update.clamps = options.clamp_min || options.clamp_max;
  update.clamp_min = options.clamp_min ? static_cast<float>(*options.clamp_min) : -INFINITY;
  update.clamp_max = options.clamp_max ? static_cast<float>(*options.clamp_max) : INFINITY;
  update.clips = options.grad_clip.has_value();
  update.grad_clip = update.clips ? static_cast<float>(*options.grad_clip) : 0.0f;
  for (int64_t step = 0; step < job.steps; ++step) {
    const int64_t row = std::min(job.key.index + step, options.schedule.size(0) - 1);
    update.step = job.key.step + step;
    update.noisy = false;
    for (int64_t l = 0; l < width; ++l) {
      const float* pair = schedule + (per_chain ? 2 * (row * job.batch + first + std::min(l, count - 1)) : 2 * row);
      eta[l] = pair[0];
      sigma[l] = pair[1];
      update.noisy |= pair[1] != 0;
    }
    job.kernels.run(job.program, arena, width);
    for (int64_t l = 0; l < count; ++l) job.energies[step * job.batch + first + l] = energy[l];
    job.kernels.update(job.program, arena, width, update);
  }
  store_block(job, arena, job.x_out, first);
}

void run_job(LaneJob job) {
  if (job.batch == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  job.width = width_for(job.program, job.batch, threads);
  job.kernels = chosen_kernels();
  const int64_t blocks = (job.batch + job.width - 1) / job.width;
  const int64_t arena = job.program.header->arena * job.width + kLaneScratch;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(arena + 6 * kMaxWidth + 16);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    for (int64_t block = begin; block < end; ++block) run_block(job, aligned, aligned + arena, block * job.width);
  });
}

}  // namespace

void run_lanes(Tensor energies, Tensor gradient, Tensor x, Tensor code, Tensor tables, Tensor constants) {
  LaneJob job{};
  job.program = decoded(x, code, tables, constants);
  job.batch = x.size(0);
  job.sample = job.program.header->sample;
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.energies = static_cast<float*>(energies.mutable_data_ptr());
  job.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  run_job(job);
}

void run_lane_chain(const StepOptions& options, Tensor energies, Tensor x, Tensor code, Tensor tables, Tensor constants) {
  const Key key = read_key(options.key);
  LaneJob job{};
  job.program = decoded(x, code, tables, constants);
  job.batch = x.size(0);
  job.sample = job.program.header->sample;
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.x_out = static_cast<float*>(x.mutable_data_ptr());
  job.energies = static_cast<float*>(energies.mutable_data_ptr());
  job.steps = energies.size(0);
  job.options = &options;
  job.key = key;
  const ChainIds ids(options.chain_ids, x.size(0), key.step + std::max<int64_t>(job.steps - 1, 0));
  job.ids = &ids;
  run_job(job);
  auto* data = static_cast<int64_t*>(options.key.mutable_data_ptr());
  data[1] += job.steps;
  data[2] += job.steps;
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("run_lanes", TORCH_BOX(&fastebm::run_lanes));
  library.impl("run_lane_chain", TORCH_BOX(&fastebm::WithStepOptions<&fastebm::run_lane_chain>::call));
}
