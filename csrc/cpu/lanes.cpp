// fastebm_cpp::run_lanes and run_lane_chain: the energy and gradient of many samples side by side, once or for a whole chain.
//
// A worker takes a block of samples, one in each lane, through the program; in a chain it then draws their noise, updates them
// and goes on, so that nothing but the energies leaves its cache before the last step. Blocks don't wait for one another. Samples
// are read and written once a call.
#include "lanes_check.h"
#include "lanes_team.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "../step_options.h"
#include "langevin_check.h"
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

// Work in a call below which other threads are not woken: waiting for one that another process keeps from its core costs more.
constexpr double kAloneNanoseconds = 500e3;

struct LaneJob {
  LaneProgram program;
  LaneKernels kernels;
  int64_t batch, sample, width;
  double cost;  // nanoseconds of a sample and step
  const float* x;
  const float* conditions;  // (batch, C)
  float* x_out;
  float* energies;  // (steps, batch)
  float* gradient;
  int64_t steps;
  const StepOptions* options;
  Key key;
  const ChainIds* ids;
};

// Samples side by side: as many as keep the arena in a core's cache, at least 32 where there are so many, for which products read
// their weights once, and no more than give every thread some.
int64_t width_for(const LaneProgram& program, int64_t batch, int64_t threads) {
  if (batch < 4) return 1;
  constexpr int64_t kCache = 512 << 10, kLeast = 32;
  const auto fits = [&](int64_t width) { return width * program.header->arena * int64_t{sizeof(float)} <= kCache; };
  const auto shared = [&](int64_t width) { return threads == 1 ? width < batch : 2 * width * threads <= batch; };
  int64_t width = kLaneGroup;
  while (width < kMaxWidth && shared(width) && (width < kLeast || fits(2 * width))) width *= 2;
  return width;
}

// plane[e, lane] = from[sample of the lane, e] of `numbers`. Lanes beyond the batch repeat its last sample.
template <class T>
void load_plane(const LaneJob& job, const T* from, int64_t numbers, float* plane, int64_t first) {
  constexpr int64_t kElements = 16;
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t begin = 0; begin < numbers; begin += kElements) {
    const int64_t end = std::min(numbers, begin + kElements);
    for (int64_t l = 0; l < job.width; ++l) {
      const T* sample = from + (first + std::min(l, count - 1)) * numbers;
      for (int64_t e = begin; e < end; ++e) plane[e * job.width + l] = static_cast<float>(sample[e]);
    }
  }
}

void store_plane(const LaneJob& job, const float* plane, float* to, int64_t first) {
  constexpr int64_t kElements = 16;
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t begin = 0; begin < job.sample; begin += kElements) {
    const int64_t end = std::min(job.sample, begin + kElements);
    for (int64_t l = 0; l < count; ++l)
      for (int64_t e = begin; e < end; ++e) to[(first + l) * job.sample + e] = plane[e * job.width + l];
  }
}

int64_t row_of(const Tensor& table, int64_t index) { return std::min(index, table.size(0) - 1); }

// The tensors that an update reads for each number of a sample, in the order of their planes.
std::array<const std::optional<Tensor>*, 5> planes_of(const StepOptions& o) {
  return {&o.data_target, &o.lower_bounds, &o.upper_bounds, &o.mask, &o.known};
}

// The memory that a worker needs behind its arena, for updates.
int64_t update_numbers(const LaneJob& job) {
  if (!job.options) return 0;
  int64_t planes = 0;
  for (const auto* tensor : planes_of(*job.options)) planes += tensor->has_value();
  return kUpdateRows * kMaxWidth + planes * job.sample * job.width;
}

// What stays the same for all updates of a block.
LaneUpdate update_of_block(const LaneJob& job, float* memory, int64_t first) {
  const StepOptions& options = *job.options;
  const int64_t width = job.width, count = std::min(width, job.batch - first);
  const auto rows = [&memory](int64_t number) { return std::exchange(memory, memory + number * kMaxWidth); };
  LaneUpdate update{};
  update.seed = job.key.seed;
  auto* low = reinterpret_cast<uint32_t*>(rows(1));
  auto* high = reinterpret_cast<uint32_t*>(rows(1));
  for (int64_t l = 0; l < std::max(width, kLaneRow); ++l) {
    const auto id = static_cast<uint64_t>((*job.ids)[first + std::min(l, count - 1)]);
    low[l] = static_cast<uint32_t>(id);
    high[l] = static_cast<uint32_t>(id >> 32);
  }
  update.ids_low = low;
  update.ids_high = high;
  update.step_size = rows(1);
  update.noise_std = rows(1);
  update.scale = rows(1);
  update.weight = rows(1);
  update.drift = rows(1);
  update.noise = rows(4);
  update.sums = rows(kFoldLevels);
  update.clamps = options.clamp_min || options.clamp_max;
  update.clamp_min = options.clamp_min ? static_cast<float>(*options.clamp_min) : -INFINITY;
  update.clamp_max = options.clamp_max ? static_cast<float>(*options.clamp_max) : INFINITY;
  update.clips = options.grad_clip.has_value();
  update.grad_clip = static_cast<float>(options.grad_clip.value_or(0));
  update.clips_norm = options.grad_norm_clip.has_value();
  update.grad_norm_clip = static_cast<float>(options.grad_norm_clip.value_or(0));
  update.pulls = options.data_target.has_value();
  update.data_term_hinge = static_cast<float>(options.data_term_hinge);
  const float** planes[] = {&update.target, &update.lower, &update.upper, &update.mask, &update.known};
  for (size_t i = 0; i < std::size(planes); ++i) {
    const std::optional<Tensor>& tensor = *planes_of(options)[i];
    if (!tensor) continue;
    if (tensor->scalar_type() == ScalarType::Bool) load_plane(job, static_cast<const bool*>(tensor->const_data_ptr()), job.sample, memory, first);
    else load_plane(job, static_cast<const float*>(tensor->const_data_ptr()), job.sample, memory, first);
    *planes[i] = std::exchange(memory, memory + job.sample * width);
  }
  return update;
}

// What changes with the step.
void set_step(const LaneJob& job, LaneUpdate& update, int64_t step, int64_t first) {
  const StepOptions& options = *job.options;
  const int64_t count = std::min(job.width, job.batch - first), index = job.key.index + step;
  const bool per_chain = options.schedule.dim() == 3;
  const auto* schedule = static_cast<const float*>(options.schedule.const_data_ptr());
  const int64_t row = row_of(options.schedule, index);
  update.step = job.key.step + step;
  if (const auto& weights = options.data_term_weight; weights && update.pulls)
    update.data_term_weight = static_cast<const float*>(weights->const_data_ptr())[row_of(*weights, index)];
  if (step > 0 && row == row_of(options.schedule, index - 1)) return;
  update.noisy = false;
  update.every_noisy = true;
  for (int64_t l = 0; l < std::max(job.width, kLaneRow); ++l) {
    const float* pair = schedule + 2 * (per_chain ? row * job.batch + first + std::min(l, count - 1) : row);
    update.step_size[l] = pair[0];
    update.noise_std[l] = pair[1];
    update.noisy |= pair[1] != 0;
    update.every_noisy &= pair[1] != 0;
  }
}

void run_block(LaneJob job, float* arena, float* memory, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first);
  if (job.width > 1) job.width = (count + kLaneGroup - 1) / kLaneGroup * kLaneGroup;  // the last block may be narrower
  load_plane(job, job.x, job.sample, arena, first);
  load_plane(job, job.conditions, job.program.header->conditions, arena + job.sample * job.width, first);
  const float* energy = arena + job.program.header->energy * job.width;
  if (!job.options) {
    job.kernels.run(job.program, arena, job.width);
    std::copy_n(energy, count, job.energies + first);
    store_plane(job, arena + job.program.header->gradient * job.width, job.gradient, first);
    return;
  }
  LaneUpdate update = update_of_block(job, memory, first);
  for (int64_t step = 0; step < job.steps; ++step) {
    set_step(job, update, step, first);
    job.kernels.run(job.program, arena, job.width);
    std::copy_n(energy, count, job.energies + step * job.batch + first);
    job.kernels.update(job.program, arena, job.width, update);
  }
  store_plane(job, arena, job.x_out, first);
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
  const double work = static_cast<double>(job.batch) * static_cast<double>(job.options ? job.steps : 1) * job.cost;
  const int64_t threads = work < kAloneNanoseconds ? 1 : torch::stable::get_num_threads();
  job.width = width_for(job.program, job.batch, threads);
  job.kernels = chosen_kernels();
  const int64_t blocks = (job.batch + job.width - 1) / job.width, workers = std::min(threads, blocks);
  const int64_t arena = (job.program.header->arena * job.width + kLaneScratch + 15) / 16 * 16;
  const Arenas arenas(workers, arena + update_numbers(job));
  LaneTeam::run(workers, blocks, [&](int64_t worker, int64_t block) {
    run_block(job, arenas[worker], arenas[worker] + arena, block * job.width);
  });
}

struct ReadyLanes {
  std::shared_ptr<const CheckedLanes> checked;
  LaneJob job{};
};

ReadyLanes ready(const Tensor& energies, const Tensor& x, const Tensor& code, const Tensor& tables, const Tensor& constants,
                 const Tensor& conditions) {
  check_readable(code, "code", ScalarType::Long);
  check_readable(tables, "tables", ScalarType::Int);
  check_readable(constants, "constants", ScalarType::Float);
  check_readable(conditions, "conditions", ScalarType::Float);
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
  job.cost = made.checked->cost;
  job.batch = x.size(0);
  job.sample = header.sample;
  STD_TORCH_CHECK(job.batch == 0 || x.numel() / job.batch == job.sample, "this program is for samples of ", job.sample,
                  " numbers, got x with samples of ", job.batch == 0 ? 0 : x.numel() / job.batch);
  STD_TORCH_CHECK(conditions.dim() == 2 && conditions.size(0) == job.batch && conditions.size(1) == header.conditions,
                  "this program is for conditions of ", header.conditions, " numbers for each of ", job.batch, " samples");
  job.conditions = static_cast<const float*>(conditions.const_data_ptr());
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.energies = static_cast<float*>(energies.mutable_data_ptr());
  check_apart("energies", energies, "x", x);
  check_apart("energies", energies, "constants", constants);
  check_apart("energies", energies, "conditions", conditions);
  return made;
}

}  // namespace

void run_lanes(Tensor energies, Tensor gradient, Tensor x, Tensor code, Tensor tables, Tensor constants, Tensor conditions) {
  ReadyLanes made = ready(energies, x, code, tables, constants, conditions);
  check_readable(gradient, "gradient", ScalarType::Float);
  STD_TORCH_CHECK(energies.numel() == made.job.batch && gradient.numel() == x.numel(), "energies or gradient don't fit x");
  check_apart("gradient", gradient, "x", x);
  check_apart("gradient", gradient, "energies", energies);
  check_apart("gradient", gradient, "constants", constants);
  check_apart("gradient", gradient, "conditions", conditions);
  made.job.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  run_job(made.job);
}

void run_lane_chain(const StepOptions& options, Tensor energies, Tensor x, Tensor code, Tensor tables, Tensor constants,
                    Tensor conditions) {
  const Key key = read_key(options.key);
  ReadyLanes made = ready(energies, x, code, tables, constants, conditions);
  LaneJob& job = made.job;
  STD_TORCH_CHECK(energies.dim() == 2 && energies.size(1) == job.batch, "energies must be (steps, batch)");
  check_step(options, x, x, x);
  for (const auto* tensor : planes_of(options))
    if (*tensor) STD_TORCH_CHECK((*tensor)->is_contiguous(), "the tensors of an update's options must be contiguous");
  STD_TORCH_CHECK(!options.data_target || options.data_term_weight, "data_target and data_term_weight go together");
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  check_apart("x", x, "constants", constants);
  check_apart("x", x, "conditions", conditions);
  check_apart("x", x, "key", options.key);
  check_apart("x", x, "schedule", options.schedule);
  check_apart("x", x, "chain_ids", options.chain_ids);
  check_apart("energies", energies, "schedule", options.schedule);
  check_apart("energies", energies, "chain_ids", options.chain_ids);
  for (const auto* tensor : planes_of(options))
    if (*tensor) {
      check_apart("x", x, "an option", **tensor);
      check_apart("energies", energies, "an option", **tensor);
    }
  if (options.data_term_weight) check_apart("x", x, "data_term_weight", *options.data_term_weight);
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
