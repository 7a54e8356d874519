// fastebm_cpp::langevin_step: one pass over the images that draws the noise, updates, clamps and applies the mask.
//
// Bytes: 12 an element (read x and gradient, write x) in float32; the noise never leaves L1. A stretch of 1024 elements goes
// through short loops over L1 buffers, one for each option in use, so that options that are off cost nothing.
#include "chain.h"
#include "langevin_check.h"

namespace fastebm {
namespace {

// Lanes of the fixed summation order: lane l takes elements l, l + 1024, ... in turn, then the lanes fold in halves. The
// other backends sum in this very order, so that a clipped step agrees to the last bit.
constexpr int64_t kSumLanes = kStretch;

template <class State_, class Gradient_>
struct LangevinTypes {
  using State = State_;
  using Gradient = Gradient_;
};

template <class Types>
struct LangevinJob {
  using State = typename Types::State;
  using Gradient = typename Types::Gradient;
  ImageShape shape;
  Image<State> out;
  Image<const State> x;
  Image<const Gradient> grad;
  Image<const State> lower_bounds, upper_bounds;
  Image<const bool> mask;
  Image<const State> known, data_target;
  const float* schedule;    // (step size, noise std), one pair or a pair for each chain
  int64_t schedule_stride;  // 0 or 2
  Key key;
  const ChainIds* chain_ids;
  std::optional<double> clamp_min, clamp_max, grad_clip, grad_norm_clip;
  double data_term_weight, data_term_hinge;
  State* factors;  // (batch, 2): gradient scale and data term's weight of each chain, or null where both are the same for all
};

template <class State>
FASTEBM_INLINE State fold(State* __restrict lanes) {
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// Gradient scale (norm clip) and data term's weight (hinge) of chains [begin, end).
template <class Types, Isa isa>
FASTEBM_INLINE void chain_factors_body(const LangevinJob<Types>& job, int64_t begin, int64_t end) {
  using State = typename Types::State;
  alignas(64) State lanes[kSumLanes], left[kStretch], right[kStretch];
  const int64_t elements = job.shape.elements();
  for (int64_t b = begin; b < end; ++b) {
    State scale = 1, weight = static_cast<State>(job.data_term_weight);
    if (job.grad_norm_clip) {
      std::fill_n(lanes, kSumLanes, State(0));
      for (int64_t first = 0; first < elements; first += kStretch) {
        const int64_t count = std::min(kStretch, elements - first);
        const State* __restrict g = read_stretch(job.grad, left, b, first, count, job.shape);
        for (int64_t i = 0; i < count; ++i) lanes[i] = fused(g[i], g[i], lanes[i]);
      }
      const State norm = std::sqrt(fold(lanes)), limit = static_cast<State>(*job.grad_norm_clip);
      if (norm > limit) scale = limit / norm;
    }
    if (job.data_term_hinge > 0) {
      std::fill_n(lanes, kSumLanes, State(0));
      for (int64_t first = 0; first < elements; first += kStretch) {
        const int64_t count = std::min(kStretch, elements - first);
        const State* __restrict x = read_stretch(job.x, left, b, first, count, job.shape);
        const State* __restrict y = read_stretch(job.data_target, right, b, first, count, job.shape);
        for (int64_t i = 0; i < count; ++i) {
          const State d = x[i] - y[i];
          lanes[i] = fused(d, d, lanes[i]);
        }
      }
      if (!(fold(lanes) > static_cast<State>(job.data_term_hinge))) weight = 0;
    }
    job.factors[2 * b] = scale;
    job.factors[2 * b + 1] = weight;
  }
}
FASTEBM_VARIANTS(chain_factors, (const LangevinJob<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

// Comparisons written so that NaN passes through.
template <class State>
FASTEBM_INLINE State limited(State value, State low, State high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// The drift of one stretch: the gradient, clipped, plus the gradient of the data term. In place where there is nothing to add.
template <class Types, Isa isa>
FASTEBM_INLINE const typename Types::State* drift(const LangevinJob<Types>& job, typename Types::State* __restrict buffer,
                                                  typename Types::State* __restrict side, const typename Types::State* x,
                                                  int64_t b, int64_t first, int64_t count) {
  using State = typename Types::State;
  const State* g = read_stretch(job.grad, buffer, b, first, count, job.shape);
  if (job.grad_clip) {
    const State limit = static_cast<State>(*job.grad_clip);
    for (int64_t i = 0; i < count; ++i) buffer[i] = limited(g[i], -limit, limit);
    g = buffer;
  }
  if (job.grad_norm_clip) {
    const State scale = job.factors[2 * b];
    for (int64_t i = 0; i < count; ++i) buffer[i] = g[i] * scale;
    g = buffer;
  }
  if (job.data_target) {
    const State weight = job.factors ? job.factors[2 * b + 1] : static_cast<State>(job.data_term_weight);
    if (weight != 0) {
      const State* __restrict y = read_stretch(job.data_target, side, b, first, count, job.shape);
      for (int64_t i = 0; i < count; ++i) buffer[i] = fused(weight, x[i] - y[i], g[i]);
      g = buffer;
    }
  }
  return g;
}

template <class Types, Isa isa>
FASTEBM_INLINE void langevin_body(const LangevinJob<Types>& job, int64_t begin, int64_t end) {
  using State = typename Types::State;
  alignas(64) float noise[kStretch];
  alignas(64) State x_buffer[kStretch], g_buffer[kStretch], side[kStretch], out_buffer[kStretch];
  alignas(64) bool mask_buffer[kStretch];
  const int64_t stretches = job.shape.stretches(), elements = job.shape.elements();
  const bool direct = job.out.dense(job.shape.channels, job.shape.pixels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / stretches, first = task % stretches * kStretch;
    const int64_t count = std::min(kStretch, elements - first);
    const State step_size = job.schedule[b * job.schedule_stride], noise_std = job.schedule[b * job.schedule_stride + 1];
    const State* x = read_stretch(job.x, x_buffer, b, first, count, job.shape);
    const State* g = drift<Types, isa>(job, g_buffer, side, x, b, first, count);
    // `out` may be `x` itself; the loops below read and write the same index, which needs no buffer but must not be called
    // restrict.
    State* out = direct ? job.out.data + b * job.out.batch_stride + first : out_buffer;
    if (noise_std != 0) {
      draw_stretch<NormalNoise, isa>(noise, static_cast<uint32_t>(first / 4), count,
                                     noise_address(job.key.seed, job.key.step, (*job.chain_ids)[b], 0));
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = fused(noise_std, static_cast<State>(noise[i]), fused(-step_size, g[i], x[i]));
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = fused(-step_size, g[i], x[i]);
    }
    if (job.clamp_min || job.clamp_max) {
      const State low = job.clamp_min ? static_cast<State>(*job.clamp_min) : -INFINITY;
      const State high = job.clamp_max ? static_cast<State>(*job.clamp_max) : INFINITY;
      for (int64_t i = 0; i < count; ++i) out[i] = limited(out[i], low, high);
    }
    if (job.lower_bounds) {
      const State* __restrict low = read_stretch(job.lower_bounds, side, b, first, count, job.shape);
      for (int64_t i = 0; i < count; ++i) out[i] = out[i] < low[i] ? low[i] : out[i];
    }
    if (job.upper_bounds) {
      const State* __restrict high = read_stretch(job.upper_bounds, side, b, first, count, job.shape);
      for (int64_t i = 0; i < count; ++i) out[i] = out[i] > high[i] ? high[i] : out[i];
    }
    if (job.mask) {
      const bool* __restrict mask = read_stretch(job.mask, mask_buffer, b, first, count, job.shape);
      const State* __restrict known = read_stretch(job.known, side, b, first, count, job.shape);
      for (int64_t i = 0; i < count; ++i) out[i] = mask[i] ? known[i] : out[i];
    }
    if (!direct) move_stretch<State, State, false>(job.out, out, b, first, count, job.shape.pixels);
  }
}
FASTEBM_VARIANTS(langevin, (const LangevinJob<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

// An update, before its types are known.
struct LangevinArguments {
  const StepOptions& options;
  const Tensor &out, &x, &grad;
  const Key key;
  const ChainIds chain_ids;
};

int64_t row_of(const Tensor& table, const Key& key) { return std::min(key.index, table.size(0) - 1); }

template <class Types>
void run(const LangevinArguments& a) {
  using State = typename Types::State;
  const StepOptions& options = a.options;
  const ImageShape shape = image_shape(a.x);
  if (shape.batch * shape.elements() == 0) return;
  const auto* schedule = static_cast<const float*>(options.schedule.const_data_ptr());
  const bool per_chain = options.schedule.dim() == 3;
  double weight = 0;
  if (const auto& weights = options.data_term_weight)
    weight = static_cast<const float*>(weights->const_data_ptr())[row_of(*weights, a.key)];
  const double hinge = options.data_target ? options.data_term_hinge : 0;
  std::vector<State> factors(options.grad_norm_clip || hinge > 0 ? 2 * shape.batch : 0);
  const LangevinJob<Types> job{shape,
                               image<State>(a.out),
                               image<const State>(a.x),
                               image<const typename Types::Gradient>(a.grad),
                               image<const State>(options.lower_bounds),
                               image<const State>(options.upper_bounds),
                               image<const bool>(options.mask),
                               image<const State>(options.known),
                               image<const State>(options.data_target),
                               schedule + row_of(options.schedule, a.key) * (per_chain ? 2 * shape.batch : 2),
                               per_chain ? 2 : 0,
                               a.key,
                               &a.chain_ids,
                               options.clamp_min,
                               options.clamp_max,
                               options.grad_clip,
                               options.grad_norm_clip,
                               weight,
                               hinge,
                               factors.empty() ? nullptr : factors.data()};
  if (job.factors)
    torch::stable::parallel_for(0, shape.batch, grain(shape.batch, shape.elements()),
                                [&](int64_t begin, int64_t end) { chain_factors<Types>(job, begin, end); });
  const int64_t tasks = shape.batch * shape.stretches();
  torch::stable::parallel_for(0, tasks, grain(tasks, std::min(shape.elements(), kStretch)),
                              [&](int64_t begin, int64_t end) { langevin<Types>(job, begin, end); });
}

template <class State>
void run_with_state(const LangevinArguments& a) {
  switch (a.grad.scalar_type()) {
    case ScalarType::Float: return run<LangevinTypes<State, float>>(a);
    case ScalarType::Double: return run<LangevinTypes<State, double>>(a);
    case ScalarType::BFloat16: return run<LangevinTypes<State, BFloat16>>(a);
    case ScalarType::Half: return run<LangevinTypes<State, Half>>(a);
    default: STD_TORCH_CHECK(false, "the gradient must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace

void langevin_step(const StepOptions& options, Tensor out, Tensor x, Tensor grad) {
  check_step(options, out, x, grad);
  const Key key = read_key(options.key);
  STD_TORCH_CHECK(key.index >= 0, "the schedule index must not be negative, got ", key.index);
  const LangevinArguments arguments{options, out, x, grad, key, ChainIds(options.chain_ids, x.size(0), key.step)};
  if (x.scalar_type() == ScalarType::Double) return run_with_state<double>(arguments);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "the state must be float32 or float64");
  run_with_state<float>(arguments);
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("langevin_step", TORCH_BOX(&fastebm::WithStepOptions<&fastebm::langevin_step>::call));
}
