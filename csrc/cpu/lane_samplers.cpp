// fastebm_cpp::run_lane_sampler: steps of MALA, underdamped dynamics or HMC by a lane program, many in one call.
//
// Each step has the bits of the operators that make it one by one (mala.cpp, underdamped.cpp). As in a Langevin chain, a block of
// chains stays in its worker's cache for all steps of a call.
#include <utility>

#include "lanes_job.h"

namespace fastebm {
namespace {

enum class SamplerKind : int64_t { mala, baoab, obabo, hmc };

// fastebm/rng.py numbers the streams.
constexpr uint32_t kAcceptance = 3, kMomentum = 2, kMomentumEnd = 13, kRefresh = 19;

struct SamplerOptions {
  SamplerKind kind;
  int64_t leapfrogs, steps;
  const float* schedule;
  int64_t rows, columns;  // of the schedule, columns a chain
  bool per_chain;
  const float* temperature;
  int64_t temperature_rows;
  bool temperature_per_chain;
  const float* inverse_mass;
  int64_t mass_chain_stride, mass_element_stride;
  const bool* mask;
  std::optional<double> grad_clip, low, high;
  Key key;
  const ChainIds* ids;
  float *x, *energy, *gradient, *velocity;
  bool* accepted;     // (steps, batch)
  double* log_ratio;  // (steps, batch)
};

constexpr int64_t kMoveRows = 72, kMovePlanes = 6;

int64_t move_numbers(const LaneJob& job) { return kMoveRows * kMaxWidth + kMovePlanes * job.sample * job.width; }

// What stays the same for all steps of a block.
LaneMove move_of_block(const LaneJob& job, const SamplerOptions& o, float* memory, int64_t first) {
  const int64_t width = job.width, count = std::min(width, job.batch - first), filled = std::max(width, kLaneRow);
  const auto rows = [&memory](int64_t number) { return std::exchange(memory, memory + number * kMaxWidth); };
  const auto doubles = [&rows](int64_t number) { return reinterpret_cast<double*>(rows(2 * number)); };
  LaneMove move{};
  LaneUpdate& noise = move.noise;
  auto* low = reinterpret_cast<uint32_t*>(rows(1));
  uint32_t* high[5];  // LANGEVIN first, which is stream 0
  constexpr uint32_t kStreams[5] = {0, kAcceptance, kMomentum, kMomentumEnd, kRefresh};
  for (auto& each : high) each = reinterpret_cast<uint32_t*>(rows(1));
  for (int64_t l = 0; l < filled; ++l) {
    const auto id = static_cast<uint64_t>((*o.ids)[first + std::min(l, count - 1)]);
    low[l] = static_cast<uint32_t>(id);
    for (int s = 0; s < 5; ++s) high[s][l] = kStreams[s] << 24 | static_cast<uint32_t>(id >> 32);
  }
  noise.seed = o.key.seed;
  noise.ids_low = low;
  noise.ids_high = high[0];
  move.acceptance = high[1];
  move.begin = high[2];
  move.end = high[3];
  move.refresh = high[4];
  noise.step_size = rows(1);
  noise.noise_std = rows(1);
  noise.drift = rows(1);
  noise.noise = rows(4);
  noise.clips = o.grad_clip.has_value();
  noise.grad_clip = static_cast<float>(o.grad_clip.value_or(0));
  noise.drifts = noise.noisy = noise.every_noisy = true;
  move.energy = rows(1);
  move.h = rows(1);
  move.decay = rows(1);
  move.sigma = rows(1);
  move.h_before = rows(1);
  move.decay_before = rows(1);
  move.sigma_before = rows(1);
  move.heat = rows(1);
  move.rejected = rows(1);
  move.accepted = reinterpret_cast<bool*>(rows(1));
  move.taken = rows(1);
  move.temperature = doubles(1);
  move.work = doubles(1);
  move.log_ratio = doubles(1);
  move.sums = doubles(kFoldLevels);
  move.walled = o.low.has_value() && o.high.has_value();
  move.low = static_cast<float>(o.low.value_or(0));
  move.high = static_cast<float>(o.high.value_or(0));
  const auto plane = [&] { return std::exchange(memory, memory + job.sample * width); };
  move.x = plane();
  move.gradient = plane();
  move.velocity = plane();
  move.unfolded = plane();
  float *mass = plane(), *mask = plane();
  load_plane(job, o.x, job.sample, move.x, first);
  load_plane(job, o.gradient, job.sample, move.gradient, first);
  if (o.velocity) load_plane(job, o.velocity, job.sample, move.velocity, first);
  if (o.mask) load_plane(job, o.mask, job.sample, mask, first);
  move.mask = o.mask ? mask : nullptr;
  if (o.inverse_mass)
    for (int64_t e = 0; e < job.sample; ++e)
      for (int64_t l = 0; l < width; ++l)
        mass[e * width + l] =
            o.inverse_mass[(first + std::min(l, count - 1)) * o.mass_chain_stride + e * o.mass_element_stride];
  move.inverse_mass = o.inverse_mass ? mass : nullptr;
  for (int64_t l = 0; l < width; ++l) move.energy[l] = o.energy[first + std::min(l, count - 1)];
  return move;
}

// The row of the schedule at `index` into arrays of a number for each lane.
template <size_t columns>
void read_row(const LaneJob& job, const SamplerOptions& o, int64_t index, int64_t first, const std::array<float*, columns>& to) {
  const int64_t row = std::min(index, o.rows - 1), count = std::min(job.width, job.batch - first);
  for (int64_t l = 0; l < std::max(job.width, kLaneRow); ++l) {
    const int64_t chain = first + std::min(l, count - 1);
    const float* at = o.schedule + static_cast<int64_t>(columns) * (o.per_chain ? row * job.batch + chain : row);
    for (size_t c = 0; c < columns; ++c) to[c][l] = at[c];
  }
}

void run_mala(const LaneJob& job, const SamplerOptions& o, float* arena, LaneMove& move, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t s = 0; s < o.steps; ++s) {
    read_row<2>(job, o, o.key.index + s, first, {move.noise.step_size, move.noise.noise_std});
    move.noise.step = o.key.step + s;
    const int64_t at = s * job.batch + first;
    std::copy_n(move.energy, count, job.energies + at);
    job.kernels.propose(job.program, arena, job.width, move);
    job.kernels.run(job.program, arena, job.width);
    job.kernels.test_proposal(job.program, arena, job.width, move);
    std::copy_n(move.accepted, count, o.accepted + at);
    std::copy_n(move.log_ratio, count, o.log_ratio + at);
  }
}

void run_underdamped(const LaneJob& job, const SamplerOptions& o, float* arena, LaneMove& move, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first), numbers = job.sample * job.width;
  const bool halves = o.kind == SamplerKind::obabo;
  float* gradient = arena + job.program.header->gradient * job.width;
  const float* energy = arena + job.program.header->energy * job.width;
  std::copy_n(move.gradient, numbers, gradient);
  if (o.steps == 0) return;
  read_row<3>(job, o, o.key.index, first, {move.h, move.decay, move.sigma});
  move.noise.step = o.key.step;
  job.kernels.kinetic(job.program, arena, job.width, move, halves, false, true, false);
  for (int64_t s = 0; s < o.steps; ++s) {
    std::copy_n(move.energy, count, job.energies + s * job.batch + first);
    std::swap(move.h, move.h_before);
    std::swap(move.decay, move.decay_before);
    std::swap(move.sigma, move.sigma_before);
    read_row<3>(job, o, o.key.index + s + 1, first, {move.h, move.decay, move.sigma});
    move.noise.step = o.key.step + s + 1;
    job.kernels.run(job.program, arena, job.width);
    std::copy_n(energy, job.width, move.energy);
    job.kernels.kinetic(job.program, arena, job.width, move, halves, true, s + 1 < o.steps, false);
  }
  std::copy_n(arena, numbers, move.x);
  std::copy_n(gradient, numbers, move.gradient);
}

void run_hmc(const LaneJob& job, const SamplerOptions& o, float* arena, LaneMove& move, int64_t first) {
  const int64_t count = std::min(job.width, job.batch - first), numbers = job.sample * job.width;
  float* gradient = arena + job.program.header->gradient * job.width;
  for (int64_t s = 0; s < o.steps; ++s) {
    const int64_t at = s * job.batch + first, row = std::min(o.key.index + s, o.temperature_rows - 1);
    read_row<3>(job, o, o.key.index + s, first, {move.h, move.decay, move.sigma});
    std::copy_n(move.h, std::max(job.width, kLaneRow), move.h_before);
    for (float* decay : {move.decay, move.decay_before}) std::fill_n(decay, std::max(job.width, kLaneRow), 1.0f);
    for (float* sigma : {move.sigma, move.sigma_before}) std::fill_n(sigma, std::max(job.width, kLaneRow), 0.0f);
    for (int64_t l = 0; l < std::max(job.width, kLaneRow); ++l) {
      const int64_t chain = first + std::min(l, count - 1);
      const float heat = o.temperature[o.temperature_per_chain ? row * job.batch + chain : row];
      move.heat[l] = std::sqrt(heat);
      move.temperature[l] = heat;
      move.work[l] = 0;
    }
    move.noise.step = o.key.step + s;
    std::copy_n(move.energy, count, job.energies + at);
    job.kernels.refresh(job.program, arena, job.width, move);
    std::copy_n(move.x, numbers, arena);
    std::copy_n(move.gradient, numbers, gradient);
    job.kernels.kinetic(job.program, arena, job.width, move, true, false, true, true);
    for (int64_t k = 0; k < o.leapfrogs; ++k) {
      const bool last = k + 1 == o.leapfrogs;
      job.kernels.run(job.program, arena, job.width);
      job.kernels.kinetic(job.program, arena, job.width, move, true, true, !last, last);
    }
    job.kernels.test_trajectory(job.program, arena, job.width, move);
    std::copy_n(move.accepted, count, o.accepted + at);
    std::copy_n(move.log_ratio, count, o.log_ratio + at);
  }
}

void run_sampler_block(const LaneJob& job, const SamplerOptions& o, float* arena, float* memory, int64_t first) {
  LaneMove move = move_of_block(job, o, memory, first);
  switch (o.kind) {
    case SamplerKind::mala: run_mala(job, o, arena, move, first); break;
    case SamplerKind::hmc: run_hmc(job, o, arena, move, first); break;
    default: run_underdamped(job, o, arena, move, first);
  }
  store_plane(job, move.x, o.x, first);
  store_plane(job, move.gradient, o.gradient, first);
  if (o.velocity) store_plane(job, move.velocity, o.velocity, first);
  std::copy_n(move.energy, std::min(job.width, job.batch - first), o.energy + first);
}

void check_table(const char* name, const Tensor& table, int64_t batch, int64_t columns) {
  check_readable(table, name, ScalarType::Float);
  const int64_t wide = columns ? 3 : 2;
  STD_TORCH_CHECK((table.dim() == wide - 1 || (table.dim() == wide && table.size(1) == batch)) && table.size(0) > 0 &&
                      (columns == 0 || table.size(table.dim() - 1) == columns),
                  name, " has another shape than this sampler reads");
}

}  // namespace

void run_lane_sampler(Tensor energies, Tensor accepted, Tensor log_ratio, Tensor x, Tensor energy, Tensor gradient,
                      std::optional<Tensor> velocity, Tensor code, Tensor tables, Tensor constants, Tensor conditions, int64_t kind,
                      int64_t leapfrogs, Tensor schedule, Tensor key_tensor, Tensor chain_ids, std::optional<Tensor> temperature,
                      std::optional<Tensor> inverse_mass, std::optional<Tensor> mask, std::optional<double> grad_clip,
                      std::optional<double> low, std::optional<double> high) {
  const Key key = read_key(key_tensor);
  ReadyLanes made = ready(energies, x, code, tables, constants, conditions);
  LaneJob& job = made.job;
  STD_TORCH_CHECK(kind >= 0 && kind <= 3, "there is no sampler of kind ", kind);
  SamplerOptions o{};
  o.kind = static_cast<SamplerKind>(kind);
  const bool tested = o.kind == SamplerKind::mala || o.kind == SamplerKind::hmc, moves = o.kind != SamplerKind::mala;
  STD_TORCH_CHECK(energies.dim() == 2 && energies.size(1) == job.batch, "energies must be (steps, batch)");
  o.steps = energies.size(0);
  check_readable(energy, "energy", ScalarType::Float);
  check_readable(gradient, "gradient", ScalarType::Float);
  STD_TORCH_CHECK(energy.numel() == job.batch && gradient.numel() == x.numel(), "energy or gradient don't fit x");
  check_readable(accepted, "accepted", ScalarType::Bool);
  check_readable(log_ratio, "log_ratio", ScalarType::Double);
  STD_TORCH_CHECK(!tested || (accepted.numel() == energies.numel() && log_ratio.numel() == energies.numel()),
                  "accepted and log_ratio must be (steps, batch)");
  STD_TORCH_CHECK(o.kind != SamplerKind::hmc || leapfrogs >= 1, "HMC needs at least one leapfrog step, got ", leapfrogs);
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  STD_TORCH_CHECK(low.has_value() == high.has_value(), "low and high go together");
  check_table("schedule", schedule, job.batch, moves ? 3 : 2);
  if (o.kind == SamplerKind::baoab || o.kind == SamplerKind::obabo) {
    STD_TORCH_CHECK(velocity.has_value(), "underdamped dynamics need velocities");
    check_readable(*velocity, "velocity", ScalarType::Float);
    STD_TORCH_CHECK(velocity->numel() == x.numel(), "velocity must be like x");
    o.velocity = static_cast<float*>(velocity->mutable_data_ptr());
  }
  if (o.kind == SamplerKind::hmc) {
    STD_TORCH_CHECK(temperature.has_value(), "HMC needs temperatures");
    check_table("temperature", *temperature, job.batch, 0);
    o.temperature = static_cast<const float*>(temperature->const_data_ptr());
    o.temperature_rows = temperature->size(0);
    o.temperature_per_chain = temperature->dim() == 2;
  }
  if (inverse_mass) {
    check_dtype("inverse_mass", *inverse_mass, ScalarType::Float);
    check_memory("inverse_mass", *inverse_mass);
    STD_TORCH_CHECK(inverse_mass->dim() == 2, "inverse_mass must be (1 or batch, 1 or N)");
    const int64_t chains = inverse_mass->size(0), elements = inverse_mass->size(1);
    STD_TORCH_CHECK((chains == 1 || chains == job.batch) && (elements == 1 || elements == job.sample),
                    "inverse_mass must be (1 or batch, 1 or N)");
    o.inverse_mass = static_cast<const float*>(inverse_mass->const_data_ptr());
    o.mass_chain_stride = chains == 1 ? 0 : inverse_mass->stride(0);
    o.mass_element_stride = elements == 1 ? 0 : inverse_mass->stride(1);
  }
  if (mask) {
    check_readable(*mask, "mask", ScalarType::Bool);
    STD_TORCH_CHECK(mask->numel() == x.numel(), "mask must be like x");
    o.mask = static_cast<const bool*>(mask->const_data_ptr());
  }
  const Tensor* written[] = {&energies, &accepted, &log_ratio, &x, &energy, &gradient, velocity ? &*velocity : &x};
  const Tensor* read[] = {&code,         &tables, &constants, &conditions, &schedule, &key_tensor, &chain_ids, temperature ? &*temperature : &code,
                          inverse_mass ? &*inverse_mass : &code, mask ? &*mask : &code};
  for (size_t i = 0; i < std::size(written); ++i) {
    for (const Tensor* other : read) check_apart("what is written", *written[i], "what is read", *other);
    for (size_t j = 0; j < i; ++j)
      if (written[i] != written[j]) check_apart("what is written", *written[i], "another result", *written[j]);
  }
  o.leapfrogs = leapfrogs;
  o.schedule = static_cast<const float*>(schedule.const_data_ptr());
  o.rows = schedule.size(0);
  o.per_chain = schedule.dim() == 3;
  o.grad_clip = grad_clip;
  o.low = low;
  o.high = high;
  o.key = key;
  const ChainIds ids(chain_ids, x.size(0), key.step + std::max<int64_t>(o.steps - 1, 0));
  o.ids = &ids;
  o.x = static_cast<float*>(x.mutable_data_ptr());
  o.energy = static_cast<float*>(energy.mutable_data_ptr());
  o.gradient = static_cast<float*>(gradient.mutable_data_ptr());
  o.accepted = static_cast<bool*>(accepted.mutable_data_ptr());
  o.log_ratio = static_cast<double*>(log_ratio.mutable_data_ptr());
  const int64_t runs = o.steps * (o.kind == SamplerKind::hmc ? leapfrogs : 1);
  run_blocks(job, runs, move_numbers, [&o](const LaneJob& own, float* arena, float* memory, int64_t first) {
    run_sampler_block(own, o, arena, memory, first);
  });
  auto* data = static_cast<int64_t*>(key_tensor.mutable_data_ptr());
  data[1] += o.steps;
  data[2] += o.steps;
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("run_lane_sampler", TORCH_BOX(&fastebm::run_lane_sampler)); }
