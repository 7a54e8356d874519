// fastebm_cpp::kinetic_step and kinetic_energy: half steps of BAOAB, OBABO and leapfrog in one pass over positions and
// velocities.
//
// Bytes: 20 an element (read x, velocity and gradient, write x and velocity) in float32; the noise never leaves L1. A stretch of
// 1024 elements goes through short loops in L1, one for each part of the step (fastebm/ops/underdamped.py writes them down).
#include <limits>

#include "dispatch.h"
#include "whole_chains.h"

namespace fastebm {
namespace {

// As fastebm/ops/underdamped.py and fastebm/rng.py number them.
enum class Scheme : int64_t { baoab = 0, obabo = 1, leapfrog = 2 };
constexpr int64_t kMomentum = 2, kMomentumEnd = 13;

template <class State_, class Gradient_>
struct KineticTypes {
  using State = State_;
  using Gradient = Gradient_;
};

// The inverse mass of one chain: one number, or one for each element.
template <class State>
struct InverseMass {
  const State* data = nullptr;  // null where it is 1
  int64_t chain_stride = 0;
  bool each = false;

  FASTEBM_INLINE const State* of(int64_t b, int64_t first) const {
    return data ? data + b * chain_stride + (each ? first : 0) : nullptr;
  }
};

template <class Types>
struct KineticJob {
  using State = typename Types::State;
  using Gradient = typename Types::Gradient;
  State *x, *velocity;
  double* work;
  const Gradient* grad;
  InverseMass<State> mass;
  int64_t elements, tasks_a_chain;  // one task a chain where its kinetic energy is summed, else one for each stretch
  const float *before, *now;        // (step size, decay, noise std): of the step that closes, and of the one that opens
  int64_t schedule_stride;          // 0 or 3
  Key key;
  const ChainIds* chain_ids;
  bool walls;
  State low, high;
  Scheme scheme;
  bool close, open;
};

template <class State>
struct Row {
  State step_size, decay, noise_std;
  bool quiet() const { return decay == 1 && noise_std == 0; }
};

template <class State>
FASTEBM_INLINE Row<State> row_of(const float* row, Scheme scheme) {
  if (scheme == Scheme::leapfrog) return {static_cast<State>(row[0]), 1, 0};
  return {static_cast<State>(row[0]), static_cast<State>(row[1]), static_cast<State>(row[2])};
}

template <class State>
FASTEBM_INLINE void kick(State* __restrict v, const State* __restrict g, const State* __restrict w, bool each, State step_size,
                         int64_t count) {
  const State half = step_size / 2;
  if (each) {
    for (int64_t i = 0; i < count; ++i) v[i] = fused(-(half * w[i]), g[i], v[i]);
  } else {
    const State scale = w ? -(half * *w) : -half;
    for (int64_t i = 0; i < count; ++i) v[i] = fused(scale, g[i], v[i]);
  }
}

template <class State, Isa isa>
FASTEBM_INLINE void refresh(State* __restrict v, const State* __restrict w, bool each, const Row<State>& row,
                            float* __restrict noise, int64_t first, int64_t count, const NoiseAddress& at) {
  const State decay = row.decay, noise_std = row.noise_std;
  if (noise_std == 0) {
    if (decay != 1)
      for (int64_t i = 0; i < count; ++i) v[i] = decay * v[i];
    return;
  }
  draw_stretch<NormalNoise, isa>(noise, static_cast<uint32_t>(first / 4), count, at);
  if (each) {
    for (int64_t i = 0; i < count; ++i) v[i] = fused(noise_std * std::sqrt(w[i]), static_cast<State>(noise[i]), decay * v[i]);
  } else {
    const State scale = w ? noise_std * std::sqrt(*w) : noise_std;
    for (int64_t i = 0; i < count; ++i) v[i] = fused(scale, static_cast<State>(noise[i]), decay * v[i]);
  }
}

template <class Types>
FASTEBM_INLINE void drift(const KineticJob<Types>& job, typename Types::State* __restrict x, typename Types::State* __restrict v,
                          typename Types::State distance, int64_t count) {
  using State = typename Types::State;
  if (!job.walls) {
    for (int64_t i = 0; i < count; ++i) x[i] = fused(distance, v[i], x[i]);
    return;
  }
  const State low = job.low, high = job.high, twice_low = low + low, twice_high = high + high;
  for (int64_t i = 0; i < count; ++i) {
    const State moved = fused(distance, v[i], x[i]);
    const bool below = moved<low, above = moved> high;
    const State mirrored = below ? twice_low - moved : above ? twice_high - moved : moved;
    // Beyond the other wall too: no number, which ends the trajectory.
    x[i] = mirrored < low || mirrored > high ? std::numeric_limits<State>::quiet_NaN() : mirrored;
    v[i] = below || above ? -v[i] : v[i];
  }
}

// Adds v^2 / w to the lanes. The square of a float32 is exact in float64, so that no fused multiply-add is needed for the last
// bit.
template <class State>
FASTEBM_INLINE void add_squares(double* __restrict lanes, const State* __restrict v, const State* __restrict w, bool each,
                                int64_t count) {
  if (each) {
    for (int64_t i = 0; i < count; ++i) {
      const double square = static_cast<double>(v[i]) * static_cast<double>(v[i]), term = square / static_cast<double>(w[i]);
      lanes[i] += w[i] == 0 ? 0.0 : term;
    }
  } else if (w) {
    const double mass = static_cast<double>(*w);
    if (mass == 0) return;
    for (int64_t i = 0; i < count; ++i) lanes[i] += static_cast<double>(v[i]) * static_cast<double>(v[i]) / mass;
  } else {
    for (int64_t i = 0; i < count; ++i) lanes[i] += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  }
}

template <class Types, Isa isa>
FASTEBM_INLINE void kinetic_body(const KineticJob<Types>& job, int64_t begin, int64_t end) {
  using State = typename Types::State;
  using Gradient = typename Types::Gradient;
  alignas(64) float noise[kStretch];
  alignas(64) State g_buffer[kStretch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / job.tasks_a_chain, part = task % job.tasks_a_chain;
    const Row<State> before = row_of<State>(job.before + b * job.schedule_stride, job.scheme);
    const Row<State> now = row_of<State>(job.now + b * job.schedule_stride, job.scheme);
    const bool obabo = job.scheme == Scheme::obabo;
    // Where no O step lies between closing and opening, what is added to the work is subtracted again: neither is.
    const bool cancels = job.close && job.open && !(obabo && !(before.quiet() && now.quiet()));
    const bool counts = job.work && !cancels;
    const int64_t chain = (*job.chain_ids)[b];
    LaneSum closing(counts ? job.elements : 0), opening(counts ? job.elements : 0);
    const int64_t last = job.tasks_a_chain == 1 ? job.elements : std::min(job.elements, (part + 1) * kStretch);
    for (int64_t first = part * kStretch; first < last; first += kStretch) {
      const int64_t count = std::min(kStretch, last - first);
      State* x = job.x + b * job.elements + first;
      State* v = job.velocity + b * job.elements + first;
      const State* w = job.mass.of(b, first);
      const Gradient* grad = job.grad + b * job.elements + first;
      const State* g;
      if constexpr (std::is_same_v<State, Gradient>) {
        g = grad;
      } else {
        for (int64_t i = 0; i < count; ++i) g_buffer[i] = static_cast<State>(grad[i]);
        g = g_buffer;
      }
      if (job.close) {
        kick(v, g, w, job.mass.each, before.step_size, count);
        if (counts) add_squares(closing.lanes, v, w, job.mass.each, count);
        if (obabo)
          refresh<State, isa>(v, w, job.mass.each, before, noise, first, count,
                              noise_address(job.key.seed, job.key.step - 1, chain, kMomentumEnd));
      }
      if (job.open) {
        const NoiseAddress at = noise_address(job.key.seed, job.key.step, chain, kMomentum);
        if (obabo) refresh<State, isa>(v, w, job.mass.each, now, noise, first, count, at);
        if (counts) add_squares(opening.lanes, v, w, job.mass.each, count);
        kick(v, g, w, job.mass.each, now.step_size, count);
        if (obabo || now.quiet()) {
          drift(job, x, v, now.step_size, count);
        } else {
          drift(job, x, v, now.step_size / 2, count);
          refresh<State, isa>(v, w, job.mass.each, now, noise, first, count, at);
          drift(job, x, v, now.step_size / 2, count);
        }
      }
    }
    if (counts && job.close) job.work[b] += closing.fold() / 2;
    if (counts && job.open) job.work[b] -= opening.fold() / 2;
  }
}
FASTEBM_VARIANTS(kinetic, (const KineticJob<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

template <class State>
struct EnergyJob {
  const State* velocity;
  double* out;
  InverseMass<State> mass;
  int64_t elements;
};

template <class Types, Isa isa>
FASTEBM_INLINE void energy_body(const EnergyJob<typename Types::State>& job, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    LaneSum sum(job.elements);
    for (int64_t first = 0; first < job.elements; first += kStretch)
      add_squares(sum.lanes, job.velocity + b * job.elements + first, job.mass.of(b, first), job.mass.each,
                  std::min(kStretch, job.elements - first));
    job.out[b] = sum.fold() / 2;
  }
}
FASTEBM_VARIANTS(energy, (const EnergyJob<typename Kernel::State>& job, int64_t begin, int64_t end), (job, begin, end))

void check_mass(const std::optional<Tensor>& mass, const Tensor& x) {
  if (!mass) return;
  check_contiguous("inverse_mass", *mass, x.scalar_type());
  STD_TORCH_CHECK(mass->dim() == 2 && (mass->size(0) == 1 || mass->size(0) == x.size(0)) &&
                      (mass->size(1) == 1 || mass->size(1) == elements_of_a_chain(x)),
                  "inverse_mass must be (1 or chains, 1 or elements of a chain)");
}

template <class State>
InverseMass<State> mass_of(const std::optional<Tensor>& mass) {
  if (!mass) return {};
  return {data<const State>(*mass), mass->size(0) == 1 ? 0 : mass->size(1), mass->size(1) != 1};
}

struct KineticArguments {
  const Tensor &x, &velocity;
  const std::optional<Tensor>& work;
  const Tensor &grad, &schedule;
  const Key key;
  const ChainIds chain_ids;
  const std::optional<Tensor>& inverse_mass;
  const std::optional<double> low, high;
  const Scheme scheme;
  const bool close, open;
};

template <class State, class Gradient>
void run(const KineticArguments& a) {
  const int64_t batch = a.x.size(0), elements = elements_of_a_chain(a.x), rows = a.schedule.size(0);
  const bool per_chain = a.schedule.dim() == 3;
  const int64_t row_size = per_chain ? 3 * batch : 3;
  const int64_t index = std::min(a.key.index, rows), stretches = (elements + kStretch - 1) / kStretch;
  const float* schedule = data<const float>(a.schedule);
  const KineticJob<KineticTypes<State, Gradient>> job{data<State>(a.x),
                                                      data<State>(a.velocity),
                                                      data<double>(a.work),
                                                      data<const Gradient>(a.grad),
                                                      mass_of<State>(a.inverse_mass),
                                                      elements,
                                                      a.work ? 1 : stretches,
                                                      schedule + std::max<int64_t>(index - 1, 0) * row_size,
                                                      schedule + std::min(index, rows - 1) * row_size,
                                                      per_chain ? 3 : 0,
                                                      a.key,
                                                      &a.chain_ids,
                                                      a.low || a.high,
                                                      a.low ? static_cast<State>(*a.low) : -INFINITY,
                                                      a.high ? static_cast<State>(*a.high) : INFINITY,
                                                      a.scheme,
                                                      a.close,
                                                      a.open};
  const int64_t tasks = batch * job.tasks_a_chain;
  torch::stable::parallel_for(0, tasks, grain(tasks, a.work ? elements : std::min(elements, kStretch)),
                              [&](int64_t begin, int64_t end) { kinetic<KineticTypes<State, Gradient>>(job, begin, end); });
}

template <class State>
void run_with_state(const KineticArguments& a) {
  dispatch(a.grad, [&]<class Gradient>() { run<State, Gradient>(a); });
}

void check_apart_from_all(const char* name, const Tensor& written, const KineticArguments& a, const Tensor& key,
                          const Tensor& chain_ids) {
  check_apart(name, written, "grad", a.grad);
  check_apart(name, written, "schedule", a.schedule);
  check_apart(name, written, "key", key);
  check_apart(name, written, "chain_ids", chain_ids);
  if (a.inverse_mass) check_apart(name, written, "inverse_mass", *a.inverse_mass);
}

}  // namespace

void kinetic_step(Tensor x, Tensor velocity, std::optional<Tensor> work, Tensor grad, Tensor schedule, Tensor key_tensor,
                  Tensor chain_tensor, std::optional<Tensor> inverse_mass, std::optional<double> low, std::optional<double> high,
                  int64_t scheme, bool close, bool open) {
  check_states(x);
  const ScalarType type = x.scalar_type();
  check_like("velocity", velocity, x, type);
  check_like("grad", grad, x, grad.scalar_type());
  check_schedule(schedule, x, 3);
  check_walls(low, high);
  if (work) {
    check_contiguous("work", *work, ScalarType::Double);
    check_sizes("work", *work, {x.size(0)});
  }
  check_mass(inverse_mass, x);
  STD_TORCH_CHECK(scheme >= 0 && scheme <= 2, "scheme must be 0 (BAOAB), 1 (OBABO) or 2 (leapfrog), got ", scheme);
  const Key key = read_key(key_tensor);
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  const KineticArguments a{x,
                           velocity,
                           work,
                           grad,
                           schedule,
                           key,
                           ChainIds(chain_tensor, x.size(0), key.step),
                           inverse_mass,
                           low,
                           high,
                           static_cast<Scheme>(scheme),
                           close,
                           open};
  STD_TORCH_CHECK(!(a.scheme == Scheme::obabo && close && key.step == 0),
                  "OBABO closes the step before the key's, but the key is that of step 0");
  check_apart("x", x, "velocity", velocity);
  check_apart_from_all("x", x, a, key_tensor, chain_tensor);
  check_apart_from_all("velocity", velocity, a, key_tensor, chain_tensor);
  if (work) {
    check_apart("work", *work, "x", x);
    check_apart("work", *work, "velocity", velocity);
    check_apart_from_all("work", *work, a, key_tensor, chain_tensor);
  }
  if (x.numel() == 0) return;
  if (type == ScalarType::Double) return run_with_state<double>(a);
  run_with_state<float>(a);
}

void kinetic_energy(Tensor velocity, Tensor out, std::optional<Tensor> inverse_mass) {
  STD_TORCH_CHECK(velocity.dim() > 0, "velocity must be (batch, ...), got a tensor without dimensions");
  const ScalarType type = velocity.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "the velocity must be float32 or float64");
  check_contiguous("velocity", velocity, type);
  check_contiguous("out", out, ScalarType::Double);
  check_sizes("out", out, {velocity.size(0)});
  check_mass(inverse_mass, velocity);
  check_apart("out", out, "velocity", velocity);
  if (inverse_mass) check_apart("out", out, "inverse_mass", *inverse_mass);
  const int64_t batch = velocity.size(0), elements = elements_of_a_chain(velocity);
  const auto run = [&]<class State>() {
    const EnergyJob<State> job{data<const State>(velocity), data<double>(out), mass_of<State>(inverse_mass), elements};
    torch::stable::parallel_for(0, batch, grain(batch, elements),
                                [&](int64_t begin, int64_t end) { energy<KineticTypes<State, State>>(job, begin, end); });
  };
  type == ScalarType::Double ? run.operator()<double>() : run.operator()<float>();
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("kinetic_step", TORCH_BOX(&fastebm::kinetic_step));
  library.impl("kinetic_energy", TORCH_BOX(&fastebm::kinetic_energy));
}
