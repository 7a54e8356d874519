// fastebm_cpp::mala_step and metropolis: the Metropolis test of each chain, with the ratio of a Langevin proposal or a given one.
//
// Bytes: 16 an element (read both states and gradients) in float32, and 16 more where a chain is accepted (8 of them still in the
// cache). A chain is one task: its sum in the fixed order decides before anything is written.
#include <cstring>

#include "dispatch.h"
#include "whole_chains.h"

namespace fastebm {
namespace {

// As fastebm/rng.py numbers them.
constexpr int64_t kLangevin = 0, kAcceptance = 3;

template <class State_, class Gradient_>
struct MalaTypes {
  using State = State_;
  using Gradient = Gradient_;
};

// Energies, in either precision.
struct Energies {
  char* data;
  int64_t size;  // bytes of one

  explicit Energies(const Tensor& energies) : data(fastebm::data<char>(energies)), size(energies.element_size()) {}
  FASTEBM_INLINE double operator[](int64_t b) const {
    if (size == 8) return reinterpret_cast<const double*>(data)[b];
    return reinterpret_cast<const float*>(data)[b];
  }
};

// What is copied as it is where a chain is accepted.
struct States {
  char* data;
  const char* proposal;
  int64_t bytes_a_chain;

  FASTEBM_INLINE void accept(int64_t b) const {
    std::memcpy(data + b * bytes_a_chain, proposal + b * bytes_a_chain, static_cast<size_t>(bytes_a_chain));
  }
};

struct Test {
  States x, energy, grad;
  Energies proposal_energy;
  bool* accepted;
  Key key;
  const ChainIds* chain_ids;
};

// log(u) < ratio for the uniform u of stream ACCEPTANCE. NaN rejects.
FASTEBM_INLINE void decide(const Test& test, int64_t b, double log_ratio) {
  const NoiseAddress at = noise_address(test.key.seed, test.key.step, (*test.chain_ids)[b], kAcceptance);
  const float log_uniform = -0.5f * minus_two_log(uniform_from_bits(philox(0, at).lane[0]));
  const bool accepted = static_cast<double>(log_uniform) < log_ratio && std::isfinite(test.proposal_energy[b]);
  test.accepted[b] = accepted;
  if (!accepted) return;
  test.x.accept(b);
  test.energy.accept(b);
  test.grad.accept(b);
}

template <class Types>
struct MalaJob {
  using State = typename Types::State;
  using Gradient = typename Types::Gradient;
  Test test;
  const State *x, *proposal;
  const Gradient *grad, *proposal_grad;
  Energies energy;
  double* log_ratio;
  int64_t elements;
  const float* schedule;    // (step size, noise std)
  int64_t schedule_stride;  // 0 or 2
  bool clips, walls;
  State grad_clip, low, high;
};

// A stretch of a gradient in the state's type, clipped.
template <class Types>
FASTEBM_INLINE const typename Types::State* read_gradient(const MalaJob<Types>& job, typename Types::State* __restrict buffer,
                                                          const typename Types::Gradient* __restrict grad, int64_t count) {
  using State = typename Types::State;
  if constexpr (std::is_same_v<State, typename Types::Gradient>)
    if (!job.clips) return grad;
  for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<State>(grad[i]);
  if (job.clips) {
    const State low = -job.grad_clip, high = job.grad_clip;
    for (int64_t i = 0; i < count; ++i) {
      const State raised = buffer[i] < low ? low : buffer[i];
      buffer[i] = raised > high ? high : raised;
    }
  }
  return buffer;
}

template <class Types, Isa isa>
FASTEBM_INLINE void mala_body(const MalaJob<Types>& job, int64_t begin, int64_t end) {
  using State = typename Types::State;
  alignas(64) float noise[kStretch];
  alignas(64) State here[kStretch], there[kStretch];
  for (int64_t b = begin; b < end; ++b) {
    const float* row = job.schedule + b * job.schedule_stride;
    const State step_size = row[0], noise_std = row[1];
    const double eta = row[0], sigma = row[1];
    LaneSum sum(job.elements);
    double* __restrict lanes = sum.lanes;
    bool outside = false;
    for (int64_t first = 0; first < job.elements; first += kStretch) {
      const int64_t count = std::min(kStretch, job.elements - first), at = b * job.elements + first;
      const State* __restrict x = job.x + at;
      const State* __restrict proposal = job.proposal + at;
      const State* __restrict g = read_gradient(job, here, job.grad + at, count);
      const State* __restrict back = read_gradient(job, there, job.proposal_grad + at, count);
      if (!job.walls) {
        for (int64_t i = 0; i < count; ++i) {
          const double difference = static_cast<double>(back[i]) - static_cast<double>(g[i]);
          const double total = static_cast<double>(back[i]) + static_cast<double>(g[i]);
          const double way = static_cast<double>(proposal[i]) - static_cast<double>(x[i]);
          lanes[i] = fused(fused(eta, difference, -2.0 * way), total, lanes[i]);
        }
        continue;
      }
      if (noise_std == 0) std::fill_n(noise, count, 0.0f);
      else
        draw_stretch<NormalNoise, isa>(noise, static_cast<uint32_t>(first / 4), count,
                                       noise_address(job.test.key.seed, job.test.key.step, (*job.test.chain_ids)[b], kLangevin));
      const State low = job.low, high = job.high;
      int beyond = 0;
      for (int64_t i = 0; i < count; ++i) {
        const State unfolded = fused(noise_std, static_cast<State>(noise[i]), fused(-step_size, g[i], x[i]));
        const bool turned = unfolded < low || unfolded > high;
        const double difference = static_cast<double>(back[i]) - static_cast<double>(g[i]);
        const double total = static_cast<double>(back[i]) + static_cast<double>(g[i]);
        const double way = 2.0 * (static_cast<double>(unfolded) - static_cast<double>(x[i]));
        lanes[i] = fused(fused(eta, turned ? total : difference, turned ? way : -way), turned ? difference : total, lanes[i]);
        beyond |= !(proposal[i] >= low && proposal[i] <= high);  // NaN too
      }
      outside = outside || beyond;
    }
    const double rise = job.test.proposal_energy[b] - job.energy[b], temperature = sigma * sigma / (2 * eta);
    const double ratio = outside ? -INFINITY : -(rise + sum.fold() / 4) / temperature;
    job.log_ratio[b] = ratio;
    decide(job.test, b, ratio);
  }
}
FASTEBM_VARIANTS(mala, (const MalaJob<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

// The tensors of a test, in the order of the schemas.
struct TestTensors {
  const Tensor &x, &energy, &grad, &accepted, &proposal, &proposal_energy, &proposal_grad, &log_ratio, &key, &chain_ids;
};

void check_test(const TestTensors& t, bool writes_ratio) {
  check_states(t.x);
  const ScalarType type = t.x.scalar_type(), energy_type = t.energy.scalar_type(), grad_type = t.grad.scalar_type();
  STD_TORCH_CHECK(energy_type == ScalarType::Float || energy_type == ScalarType::Double, "energy must be float32 or float64");
  check_like("grad", t.grad, t.x, grad_type);
  check_like("proposal", t.proposal, t.x, type);
  check_like("proposal_grad", t.proposal_grad, t.x, grad_type);
  const struct {
    const char* name;
    const Tensor& tensor;
    ScalarType type;
  } by_chain[] = {{"energy", t.energy, energy_type},
                  {"proposal_energy", t.proposal_energy, energy_type},
                  {"accepted", t.accepted, ScalarType::Bool},
                  {"log_ratio", t.log_ratio, ScalarType::Double}};
  for (const auto& each : by_chain) {
    check_contiguous(each.name, each.tensor, each.type);
    check_sizes(each.name, each.tensor, {t.x.size(0)});
  }
  const std::pair<const char*, const Tensor*> tensors[] = {{"x", &t.x},
                                                           {"energy", &t.energy},
                                                           {"grad", &t.grad},
                                                           {"accepted", &t.accepted},
                                                           {"log_ratio", &t.log_ratio},
                                                           {"proposal", &t.proposal},
                                                           {"proposal_energy", &t.proposal_energy},
                                                           {"proposal_grad", &t.proposal_grad},
                                                           {"key", &t.key},
                                                           {"chain_ids", &t.chain_ids}};
  const size_t written = writes_ratio ? 5 : 4;
  for (size_t i = 0; i < written; ++i)
    for (size_t j = i + 1; j < std::size(tensors); ++j)
      check_apart(tensors[i].first, *tensors[i].second, tensors[j].first, *tensors[j].second);
}

States states(const Tensor& written, const Tensor& proposal) {
  return {data<char>(written), data<const char>(proposal),
          elements_of_a_chain(written) * static_cast<int64_t>(written.element_size())};
}

Test make_test(const TestTensors& t, const Key& key, const ChainIds& chain_ids) {
  return {states(t.x, t.proposal),
          states(t.energy, t.proposal_energy),
          states(t.grad, t.proposal_grad),
          Energies(t.proposal_energy),
          data<bool>(t.accepted),
          key,
          &chain_ids};
}

}  // namespace

void metropolis(Tensor x, Tensor energy, Tensor grad, Tensor accepted, Tensor proposal, Tensor proposal_energy,
                Tensor proposal_grad, Tensor log_ratio, Tensor key_tensor, Tensor chain_tensor) {
  const TestTensors tensors{x,         energy,     grad,        accepted, proposal, proposal_energy, proposal_grad,
                            log_ratio, key_tensor, chain_tensor};
  check_test(tensors, false);
  const Key key = read_key(key_tensor);
  const int64_t batch = x.size(0);
  const ChainIds chain_ids(chain_tensor, batch, key.step);
  const Test test = make_test(tensors, key, chain_ids);
  const auto* ratios = data<const double>(log_ratio);
  torch::stable::parallel_for(0, batch, grain(batch, elements_of_a_chain(x)), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) decide(test, b, ratios[b]);
  });
}

void mala_step(Tensor x, Tensor energy, Tensor grad, Tensor accepted, Tensor log_ratio, Tensor proposal, Tensor proposal_energy,
               Tensor proposal_grad, Tensor schedule, Tensor key_tensor, Tensor chain_tensor, std::optional<double> grad_clip,
               std::optional<double> low, std::optional<double> high) {
  const TestTensors tensors{x,         energy,     grad,        accepted, proposal, proposal_energy, proposal_grad,
                            log_ratio, key_tensor, chain_tensor};
  check_test(tensors, true);
  check_schedule(schedule, x, 2);
  check_walls(low, high);
  for (const auto& [name, written] : {std::pair<const char*, const Tensor&>{"x", x},
                                      {"energy", energy},
                                      {"grad", grad},
                                      {"accepted", accepted},
                                      {"log_ratio", log_ratio}})
    check_apart(name, written, "schedule", schedule);
  const Key key = read_key(key_tensor);
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  const int64_t batch = x.size(0), elements = elements_of_a_chain(x);
  const ChainIds chain_ids(chain_tensor, batch, key.step);
  const bool per_chain = schedule.dim() == 3;
  const float* row = data<const float>(schedule) + std::min(key.index, schedule.size(0) - 1) * (per_chain ? 2 * batch : 2);
  const auto run = [&]<class State, class Gradient>() {
    const MalaJob<MalaTypes<State, Gradient>> job{make_test(tensors, key, chain_ids),
                                                  data<const State>(x),
                                                  data<const State>(proposal),
                                                  data<const Gradient>(grad),
                                                  data<const Gradient>(proposal_grad),
                                                  Energies(energy),
                                                  data<double>(log_ratio),
                                                  elements,
                                                  row,
                                                  per_chain ? 2 : 0,
                                                  grad_clip.has_value(),
                                                  low || high,
                                                  grad_clip ? static_cast<State>(*grad_clip) : State(0),
                                                  low ? static_cast<State>(*low) : -INFINITY,
                                                  high ? static_cast<State>(*high) : INFINITY};
    torch::stable::parallel_for(0, batch, grain(batch, elements),
                                [&](int64_t begin, int64_t end) { mala<MalaTypes<State, Gradient>>(job, begin, end); });
  };
  dispatch(grad, [&]<class Gradient>() {
    x.scalar_type() == ScalarType::Double ? run.template operator()<double, Gradient>()
                                          : run.template operator()<float, Gradient>();
  });
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("mala_step", TORCH_BOX(&fastebm::mala_step));
  library.impl("metropolis", TORCH_BOX(&fastebm::metropolis));
}
