// fastebm_cpp::run_lanes and run_lane_chain: the energy and gradient of many samples side by side, once or for a whole chain.
//
// A worker takes a block of samples, one in each lane, through the program; in a chain it then draws their noise, updates them
// and goes on, so that nothing but the energies leaves its cache before the last step. Blocks don't wait for one another. Samples
// are read and written once a call.
#include <utility>

#include "../step_options.h"
#include "langevin_check.h"
#include "lanes_job.h"

namespace fastebm {
namespace {

// Noise in one pass with the gradient's step; or before the gradient, with or without bounds between the two.
enum class NoiseOrder : int64_t { with_gradient, before, before_and_bounded };

struct Chain {
  float* x_out;
  int64_t steps;
  const StepOptions* options;
  Key key;
  const ChainIds* ids;
  NoiseOrder order;
};

struct ChainJob : LaneJob, Chain {};

int64_t row_of(const Tensor& table, int64_t index) { return std::min(index, table.size(0) - 1); }

// The tensors that an update reads for each number of a sample, in the order of their planes.
std::array<const std::optional<Tensor>*, 5> planes_of(const StepOptions& o) {
  return {&o.data_target, &o.lower_bounds, &o.upper_bounds, &o.mask, &o.known};
}

// The memory that a worker needs behind its arena, for updates.
int64_t update_numbers(const ChainJob& job) {
  int64_t planes = 0;
  for (const auto* tensor : planes_of(*job.options)) planes += tensor->has_value();
  return kUpdateRows * kMaxWidth + planes * job.sample * job.width;
}

// What stays the same for all updates of a block.
LaneUpdate update_of_block(const ChainJob& job, float* memory, int64_t first) {
  const StepOptions& options = *job.options;
  const int64_t width = job.width, count = std::min(width, job.batch - first);
  const auto rows = [&memory](int64_t number) { return std::exchange(memory, memory + number * kMaxWidth); };
  LaneUpdate update{};
  update.seed = job.key.seed;
  update.drifts = true;
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
void set_step(const ChainJob& job, LaneUpdate& update, int64_t step, int64_t first) {
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

// x + noise_std * noise, within bounds where they are asked for between noise and gradient; a mask always holds.
void add_noise(const ChainJob& job, float* arena, const LaneUpdate& update) {
  LaneUpdate noise = update;
  noise.drifts = false;
  if (job.order == NoiseOrder::before) {
    noise.clamps = false;
    noise.lower = noise.upper = nullptr;
  }
  job.kernels.update(job.program, arena, job.width, noise);
}

void run_chain_block(const ChainJob& job, float* arena, float* memory, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first);
  const float* energy = arena + job.program.header->energy * job.width;
  LaneUpdate update = update_of_block(job, memory, first);
  for (int64_t step = 0; step < job.steps; ++step) {
    set_step(job, update, step, first);
    if (job.order != NoiseOrder::with_gradient) {
      add_noise(job, arena, update);
    }
    job.kernels.run(job.program, arena, job.width);
    std::copy_n(energy, count, job.energies + step * job.batch + first);
    if (job.order == NoiseOrder::with_gradient) {
      job.kernels.update(job.program, arena, job.width, update);
      continue;
    }
    LaneUpdate quiet = update;
    quiet.noisy = quiet.every_noisy = false;
    job.kernels.update(job.program, arena, job.width, quiet);
  }
  store_plane(job, arena, job.x_out, first);
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
  auto* slopes = static_cast<float*>(gradient.mutable_data_ptr());
  run_blocks(
      made.job, 1, [](const LaneJob&) { return 0; },
      [&](const LaneJob& job, float* arena, float*, int64_t first) {
        job.kernels.run(job.program, arena, job.width);
        std::copy_n(arena + job.program.header->energy * job.width, std::min(job.width, job.batch - first), job.energies + first);
        store_plane(job, arena + job.program.header->gradient * job.width, slopes, first);
      });
}

void run_lane_chain(const StepOptions& options, Tensor energies, Tensor x, Tensor code, Tensor tables, Tensor constants,
                    Tensor conditions, int64_t noise_order) {
  const Key key = read_key(options.key);
  ReadyLanes made = ready(energies, x, code, tables, constants, conditions);
  LaneJob& job = made.job;
  STD_TORCH_CHECK(noise_order >= 0 && noise_order <= 2, "there is no order of noise ", noise_order);
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
  const int64_t steps = energies.size(0);
  const ChainIds ids(options.chain_ids, x.size(0), key.step + std::max<int64_t>(steps - 1, 0));
  const Chain chain{static_cast<float*>(x.mutable_data_ptr()), steps, &options, key, &ids,
                    static_cast<NoiseOrder>(noise_order)};
  run_blocks(
      job, steps, [&](const LaneJob& sized) { return update_numbers({sized, chain}); },
      [&](const LaneJob& own, float* arena, float* memory, int64_t first) { run_chain_block({own, chain}, arena, memory, first); });
  auto* data = static_cast<int64_t*>(options.key.mutable_data_ptr());
  data[1] += steps;
  data[2] += steps;
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("run_lanes", TORCH_BOX(&fastebm::run_lanes));
  library.impl("run_lane_chain", TORCH_BOX(&fastebm::WithStepOptions<&fastebm::run_lane_chain>::call));
}
