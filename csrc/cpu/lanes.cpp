// fastebm_cpp::run_lanes and run_lane_chain: the energy and gradient of many samples side by side, once or for a whole chain.
//
// A worker takes a block of samples, one in each lane, through the program; in a chain it then draws their noise, updates them
// and goes on, so that nothing but the energies leaves its cache before the last step. Blocks don't wait for one another. Samples
// are read and written once a call.
#include "lanes_check.h"

#include <cstdlib>
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

void check_readable(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has another dtype than kernels read");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, " has no memory");
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

// Memory of all workers, not initialised: a checked program reads nothing that it didn't write.
class Arenas {
 public:
  Arenas(int64_t workers, int64_t numbers) : numbers_((numbers + 15) / 16 * 16) {
    memory_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(workers * numbers_) * sizeof(float)));
    STD_TORCH_CHECK(memory_ != nullptr, "there is no memory for ", workers * numbers_, " numbers");
  }
  Arenas(const Arenas&) = delete;
  ~Arenas() { std::free(memory_); }
  float* operator[](int64_t worker) const { return memory_ + worker * numbers_; }

 private:
  int64_t numbers_;
  float* memory_;
};

void run_job(LaneJob job) {
  if (job.batch == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  job.width = width_for(job.program, job.batch, threads);
  job.kernels = chosen_kernels();
  const int64_t blocks = (job.batch + job.width - 1) / job.width, workers = std::min(threads, blocks);
  const int64_t arena = (job.program.header->arena * job.width + kLaneScratch + 15) / 16 * 16;
  const Arenas arenas(workers, arena + 6 * kMaxWidth);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t block = worker; block < blocks; block += workers)
        run_block(job, arenas[worker], arenas[worker] + arena, block * job.width);
  });
}

struct ReadyLanes {
  std::shared_ptr<const CheckedLanes> checked;
  LaneJob job{};
};

ReadyLanes ready(const Tensor& energies, const Tensor& x, const Tensor& code, const Tensor& tables, const Tensor& constants) {
  check_readable(code, "code", ScalarType::Long);
  check_readable(tables, "tables", ScalarType::Int);
  check_readable(constants, "constants", ScalarType::Float);
  check_readable(x, "x", ScalarType::Float);
  check_readable(energies, "energies", ScalarType::Float);
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (batch, ...), got a tensor without dimensions");
  ReadyLanes made;
  made.checked = checked_lanes(static_cast<const int64_t*>(code.const_data_ptr()), code.numel(),
                               static_cast<const int32_t*>(tables.const_data_ptr()), tables.numel());
  LaneJob& job = made.job;
  job.program = made.checked->program;
  const LaneHeader& header = *job.program.header;
  STD_TORCH_CHECK(constants.numel() == header.constants, "this program reads ", header.constants, " constants, got ",
                  constants.numel());
  job.program.constants = static_cast<const float*>(constants.const_data_ptr());
  job.batch = x.size(0);
  job.sample = header.sample;
  STD_TORCH_CHECK(job.batch == 0 || x.numel() / job.batch == job.sample, "this program is for samples of ", job.sample,
                  " numbers, got x with samples of ", job.batch == 0 ? 0 : x.numel() / job.batch);
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.energies = static_cast<float*>(energies.mutable_data_ptr());
  return made;
}

}  // namespace

void run_lanes(Tensor energies, Tensor gradient, Tensor x, Tensor code, Tensor tables, Tensor constants) {
  ReadyLanes made = ready(energies, x, code, tables, constants);
  check_readable(gradient, "gradient", ScalarType::Float);
  STD_TORCH_CHECK(energies.numel() == made.job.batch && gradient.numel() == x.numel(), "energies or gradient don't fit x");
  made.job.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  run_job(made.job);
}

void run_lane_chain(const StepOptions& options, Tensor energies, Tensor x, Tensor code, Tensor tables, Tensor constants) {
  const Key key = read_key(options.key);
  ReadyLanes made = ready(energies, x, code, tables, constants);
  LaneJob& job = made.job;
  STD_TORCH_CHECK(energies.dim() == 2 && energies.size(1) == job.batch, "energies must be (steps, batch)");
  STD_TORCH_CHECK(!options.grad_norm_clip && !options.mask && !options.data_target,
                  "lane chains have no norm clip, mask or data term");
  check_readable(options.schedule, "schedule", ScalarType::Float);
  const Tensor& schedule = options.schedule;
  STD_TORCH_CHECK((schedule.dim() == 2 || (schedule.dim() == 3 && schedule.size(1) == job.batch)) && schedule.size(0) >= 1 &&
                      schedule.size(schedule.dim() - 1) == 2,
                  "the schedule must be (rows, 2) or (rows, batch, 2)");
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  job.x_out = static_cast<float*>(x.mutable_data_ptr());
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
