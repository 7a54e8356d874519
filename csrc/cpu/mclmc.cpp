// fastebm_cpp::mclmc_step: a microcanonical Langevin update of each chain. Its sums, the few numbers that follow from them,
// then the new momentum as a combination of gradient, momentum and noise, and the move along it.
//
// Bytes: 28 an element in float32 (read gradient and momentum, read all three, write momentum and state), of which the second
// reads come from the cache for chains of up to 10^5 elements. fastebm/ops/mclmc.py says what is computed.
#include "dispatch.h"
#include "lane_sum.h"

namespace fastebm {
namespace {

constexpr int64_t kRefreshStream = 19;
constexpr double kAgainst = 0x1p-40, kLargestDelta = 700;

template <class State_, class Gradient_>
struct MclmcTypes {
  using State = State_;
  using Gradient = Gradient_;
};

template <class Types>
struct MclmcJob {
  typename Types::State *x, *momentum;
  double* work;  // (batch, 2)
  const typename Types::Gradient* grad;
  const double* coefficients;   // (closing, refresh, opening, drift)
  int64_t coefficients_stride;  // 0 or 4
  const typename Types::State* inverse_mass;
  int64_t mass_of_chain, mass_of_element;  // strides, 0 where one number serves all
  int64_t elements;
  Key key;
  const ChainIds* chain_ids;
};

FASTEBM_INLINE int64_t bits_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTEBM_INLINE double double_of(int64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// e^-delta for a delta that is not negative: the Taylor polynomial of degree 13 over |r| <= log(2) / 2.
FASTEBM_INLINE double exp_of_minus(double delta) {
  constexpr double kRound = 0x1.8p+52;
  const double z = -(delta > kLargestDelta ? kLargestDelta : delta);
  const double shifted = fused(z, 0x1.71547652b82fep+0, kRound), n = shifted - kRound;
  const double r = fused(n, -0x1.abc9e3b39803fp-56, fused(n, -0x1.62e42fefa39efp-1, z));
  double p = 0x1.6124613a86d09p-33;
  p = fused(p, r, 0x1.1eed8eff8d898p-29);
  p = fused(p, r, 0x1.ae64567f544e4p-26);
  p = fused(p, r, 0x1.27e4fb7789f5cp-22);
  p = fused(p, r, 0x1.71de3a556c734p-19);
  p = fused(p, r, 0x1.a01a01a01a01ap-16);
  p = fused(p, r, 0x1.a01a01a01a01ap-13);
  p = fused(p, r, 0x1.6c16c16c16c17p-10);
  p = fused(p, r, 0x1.1111111111111p-7);
  p = fused(p, r, 0x1.5555555555555p-5);
  p = fused(p, r, 0x1.5555555555555p-3);
  p = fused(p, r, 0.5);
  p = fused(p, r, 1.0);
  p = fused(p, r, 1.0);
  const uint64_t exponent = static_cast<uint64_t>(bits_of(shifted)) - static_cast<uint64_t>(bits_of(kRound)) + 1023;
  return p * double_of(static_cast<int64_t>(exponent << 52));
}

// log(m) for normal m > 0, by 2 artanh(f / (2 + f)) of m = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); NaN stays NaN.
FASTEBM_INLINE double log_of(double m) {
  constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const int64_t bits = bits_of(m), k = (bits - kSqrtHalf) >> 52;
  const double f = double_of(bits - k * (int64_t{1} << 52)) - 1.0, s = f / (2.0 + f), z = s * s;
  double p = 0x1.642c8590b2164p-4;
  p = fused(p, z, 0x1.8618618618618p-4);
  p = fused(p, z, 0x1.af286bca1af28p-4);
  p = fused(p, z, 0x1.e1e1e1e1e1e1ep-4);
  p = fused(p, z, 0x1.1111111111111p-3);
  p = fused(p, z, 0x1.3b13b13b13b14p-3);
  p = fused(p, z, 0x1.745d1745d1746p-3);
  p = fused(p, z, 0x1.c71c71c71c71cp-3);
  p = fused(p, z, 0x1.2492492492492p-2);
  p = fused(p, z, 0x1.999999999999ap-2);
  p = fused(p, z, 0x1.5555555555555p-1);
  const double log1p = fused(s * z, p, 2.0 * s), exponent = static_cast<double>(k);
  const double result = fused(exponent, 0x1.62e42fefa39efp-1, fused(exponent, 0x1.abc9e3b39803fp-56, log1p));
  return m == m ? result : m;
}

// The flow over delta: u' = toward e + keep u for a unit u with e.u = along; `change` of the kinetic energy over (d - 1).
struct Kick {
  double toward = 0, keep = 1, change;
};

FASTEBM_INLINE Kick kick(double delta, double along) {
  along = along < -1.0 ? -1.0 : along;
  along = along > 1.0 ? 1.0 : along;
  const double near = 1.0 + along;
  if (near < kAgainst) return {.change = -delta};
  const double zeta = exp_of_minus(delta), length = fused(1.0 - along, zeta * zeta, near);
  return {(1.0 - zeta) * fused(zeta, 1.0 - along, near) / length, 2.0 * zeta / length, delta + log_of(0.5 * length)};
}

// Sums over a chain of products of the gradient g, the momentum u and the noise z.
struct Sums {
  double gg, ug, uu, zg, zu, zz;
};

// The momentum is g of_g + u of_u + z of_z.
struct Turn {
  double of_g = 0, of_u = 1, of_z = 0;
};

FASTEBM_INLINE Turn turn(const double* row, const Sums& sum, double freedom, double* work) {
  const double closing = row[0], refresh = row[1], opening = row[2];
  const double force = std::sqrt(sum.gg);
  double length = std::sqrt(sum.uu);
  Turn t;
  if (closing != 0 && sum.gg != 0) {
    const Kick flow = kick(closing * force / freedom, -(sum.ug / (force * length)));
    t.of_g = -(flow.toward / force);
    t.of_u = flow.keep / length;
    length = 1;
    work[0] += freedom * flow.change;
  }
  if (refresh != 0) {
    const double crossed = fused(t.of_g, sum.zg, t.of_u * sum.zu);
    const double mixed = std::sqrt(fused(length, length, refresh * fused(2.0, crossed, refresh * sum.zz)));
    if (mixed != 0) {
      t = {t.of_g / mixed, t.of_u / mixed, refresh / mixed};
      length = 1;
    }
  }
  if (opening != 0 && sum.gg != 0) {
    const double along = fused(t.of_g, sum.gg, fused(t.of_u, sum.ug, t.of_z * sum.zg));
    const Kick flow = kick(opening * force / freedom, -(along / (force * length)));
    const double kept = flow.keep / length;
    t = {fused(kept, t.of_g, -(flow.toward / force)), kept * t.of_u, kept * t.of_z};
    work[1] += freedom * flow.change;
  }
  return t;
}

// One stretch of a chain in L1: the gradient as it is used, the momentum, the noise.
template <class State>
struct Stretch {
  alignas(64) State gradient[kStretch], noise[kStretch], scale[kStretch];
  alignas(64) float drawn[kStretch];
};

// Elements [first, first + count) of chain b: gradient and noise, where they are used, by the root of the inverse mass.
// Returns how many elements have a mass of 0.
template <class Types, Isa isa>
FASTEBM_INLINE int64_t read(const MclmcJob<Types>& job, Stretch<typename Types::State>& at, int64_t b, int64_t first,
                            int64_t count, bool pulled, bool refreshed) {
  using State = typename Types::State;
  if (pulled) {
    const typename Types::Gradient* __restrict grad = job.grad + b * job.elements + first;
    for (int64_t i = 0; i < count; ++i) at.gradient[i] = static_cast<State>(grad[i]);
  } else {
    std::fill_n(at.gradient, count, State(0));
  }
  if (refreshed) {
    draw_stretch<NormalNoise, isa>(at.drawn, static_cast<uint32_t>(first / 4), count,
                                   noise_address(job.key.seed, job.key.step, (*job.chain_ids)[b], kRefreshStream));
    for (int64_t i = 0; i < count; ++i) at.noise[i] = at.drawn[i];
  }
  if (!job.inverse_mass) return 0;
  const State* __restrict mass = job.inverse_mass + b * job.mass_of_chain;
  if (job.mass_of_element) {
    for (int64_t i = 0; i < count; ++i) at.scale[i] = std::sqrt(mass[first + i]);
  } else {
    std::fill_n(at.scale, count, std::sqrt(mass[0]));
  }
  int64_t fixed = 0;
  for (int64_t i = 0; i < count; ++i) fixed += at.scale[i] == 0;
  for (int64_t i = 0; i < count; ++i) at.gradient[i] = at.scale[i] * at.gradient[i];
  if (refreshed)
    for (int64_t i = 0; i < count; ++i) at.noise[i] = at.scale[i] == 0 ? 0 : at.noise[i];
  return fixed;
}

template <class State>
FASTEBM_INLINE void add_products(double* __restrict lanes, const State* __restrict first, const State* __restrict second,
                                 int64_t count) {
  for (int64_t i = 0; i < count; ++i) lanes[i] = fused(static_cast<double>(first[i]), static_cast<double>(second[i]), lanes[i]);
}

template <class Types, Isa isa>
FASTEBM_INLINE void mclmc_body(const MclmcJob<Types>& job, int64_t begin, int64_t end) {
  using State = typename Types::State;
  Stretch<State> at;
  const int64_t elements = job.elements;
  for (int64_t b = begin; b < end; ++b) {
    const double* row = job.coefficients + b * job.coefficients_stride;
    const bool pulled = row[0] != 0 || row[2] != 0, refreshed = row[1] != 0;
    // Without a refresh the last three are not used.
    LaneSum gg(elements), ug(elements), uu(elements);
    LaneSum zg(refreshed ? elements : 0), zu(refreshed ? elements : 0), zz(refreshed ? elements : 0);
    int64_t fixed = 0;
    for (int64_t first = 0; first < elements; first += kStretch) {
      const int64_t count = std::min(kStretch, elements - first);
      fixed += read<Types, isa>(job, at, b, first, count, pulled, refreshed);
      const State* momentum = job.momentum + b * elements + first;
      add_products(gg.lanes, at.gradient, at.gradient, count);
      add_products(ug.lanes, momentum, at.gradient, count);
      add_products(uu.lanes, momentum, momentum, count);
      if (refreshed) {
        add_products(zg.lanes, at.noise, at.gradient, count);
        add_products(zu.lanes, at.noise, momentum, count);
        add_products(zz.lanes, at.noise, at.noise, count);
      }
    }
    const Sums sum{gg.fold(), ug.fold(), uu.fold(), zg.fold(), zu.fold(), zz.fold()};
    const Turn t = turn(row, sum, static_cast<double>(elements - fixed - 1), job.work + 2 * b);
    const State drift = static_cast<State>(row[3]);
    for (int64_t first = 0; first < elements; first += kStretch) {
      const int64_t count = std::min(kStretch, elements - first);
      if (elements > kStretch) read<Types, isa>(job, at, b, first, count, pulled, refreshed);
      State* __restrict momentum = job.momentum + b * elements + first;
      State* __restrict x = job.x + b * elements + first;
      // In float64, since a momentum nearly against the force comes out of large numbers that cancel.
      if (refreshed) {
        for (int64_t i = 0; i < count; ++i) {
          const double g = at.gradient[i], u = momentum[i], z = at.noise[i];
          momentum[i] = static_cast<State>(fused(t.of_z, z, fused(t.of_g, g, t.of_u * u)));
        }
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const double g = at.gradient[i], u = momentum[i];
          momentum[i] = static_cast<State>(fused(t.of_g, g, t.of_u * u));
        }
      }
      if (row[3] == 0) continue;
      if (job.inverse_mass) {
        for (int64_t i = 0; i < count; ++i) x[i] = fused(drift, at.scale[i] * momentum[i], x[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) x[i] = fused(drift, momentum[i], x[i]);
      }
    }
  }
}
FASTEBM_VARIANTS(mclmc, (const MclmcJob<Kernel>& job, int64_t begin, int64_t end), (job, begin, end))

struct MclmcArguments {
  const Tensor &x, &momentum, &work, &grad, &coefficients;
  const std::optional<Tensor>& inverse_mass;
  const Key key;
  const ChainIds chain_ids;
};

template <class Types>
void run(const MclmcArguments& a) {
  using State = typename Types::State;
  const int64_t batch = a.x.size(0), elements = a.x.numel() / batch;
  const bool mass = a.inverse_mass.has_value();
  const MclmcJob<Types> job{data<State>(a.x),
                            data<State>(a.momentum),
                            data<double>(a.work),
                            data<const typename Types::Gradient>(a.grad),
                            data<const double>(a.coefficients),
                            a.coefficients.size(0) > 1 ? 4 : 0,
                            data<const State>(a.inverse_mass),
                            mass && a.inverse_mass->size(0) > 1 ? a.inverse_mass->size(1) : 0,
                            mass && a.inverse_mass->size(1) > 1 ? 1 : 0,
                            elements,
                            a.key,
                            &a.chain_ids};
  torch::stable::parallel_for(0, batch, grain(batch, elements),
                              [&](int64_t begin, int64_t end) { mclmc<Types>(job, begin, end); });
}

template <class State>
void run_with_state(const MclmcArguments& a) {
  switch (a.grad.scalar_type()) {
    case ScalarType::Float: return run<MclmcTypes<State, float>>(a);
    case ScalarType::Double: return run<MclmcTypes<State, double>>(a);
    case ScalarType::BFloat16: return run<MclmcTypes<State, BFloat16>>(a);
    case ScalarType::Half: return run<MclmcTypes<State, Half>>(a);
    default: STD_TORCH_CHECK(false, "the gradient must be float32, float64, bfloat16 or float16");
  }
}

void check(const Tensor& x, const Tensor& momentum, const Tensor& work, const Tensor& grad, const Tensor& coefficients,
           const std::optional<Tensor>& inverse_mass) {
  STD_TORCH_CHECK(x.dim() > 0, "x must be (batch, ...), got a tensor without dimensions");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "the state must be float32 or float64");
  const auto given = x.sizes();
  const std::vector<int64_t> sizes(given.begin(), given.end());
  const int64_t batch = x.size(0), elements = batch == 0 ? 0 : x.numel() / batch;
  check_contiguous("x", x, type);
  check_contiguous("momentum", momentum, type);
  check_sizes("momentum", momentum, sizes);
  check_contiguous("grad", grad, grad.scalar_type());
  check_sizes("grad", grad, sizes);
  check_contiguous("work", work, ScalarType::Double);
  check_sizes("work", work, {batch, 2});
  check_contiguous("coefficients", coefficients, ScalarType::Double);
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && coefficients.size(1) == 4 && (coefficients.size(0) == 1 || coefficients.size(0) == batch),
      "coefficients must be (1, 4) or (batch, 4)");
  STD_TORCH_CHECK(elements <= int64_t{1} << 34, "a chain has at most 2^34 numbers, got ", elements);
  check_apart("x", x, "momentum", momentum);
  const std::pair<const char*, const Tensor*> written[] = {{"x", &x}, {"momentum", &momentum}, {"work", &work}};
  for (const auto& [name, tensor] : written) {
    check_apart(name, *tensor, "grad", grad);
    check_apart(name, *tensor, "coefficients", coefficients);
    if (tensor != &work) check_apart(name, *tensor, "work", work);
  }
  if (!inverse_mass) return;
  check_contiguous("inverse_mass", *inverse_mass, type);
  STD_TORCH_CHECK(inverse_mass->dim() == 2 && (inverse_mass->size(0) == 1 || inverse_mass->size(0) == batch) &&
                      (inverse_mass->size(1) == 1 || inverse_mass->size(1) == elements),
                  "inverse_mass must be (1 or batch, 1 or elements)");
  for (const auto& [name, tensor] : written) check_apart(name, *tensor, "inverse_mass", *inverse_mass);
}

}  // namespace

void mclmc_step(Tensor x, Tensor momentum, Tensor work, Tensor grad, Tensor coefficients, Tensor key_tensor, Tensor chain_tensor,
                std::optional<Tensor> inverse_mass) {
  check(x, momentum, work, grad, coefficients, inverse_mass);
  const Key key = read_key(key_tensor);
  const MclmcArguments arguments{
      x, momentum, work, grad, coefficients, inverse_mass, key, ChainIds(chain_tensor, x.size(0), key.step)};
  if (x.numel() == 0) return;
  if (x.scalar_type() == ScalarType::Double) return run_with_state<double>(arguments);
  run_with_state<float>(arguments);
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("mclmc_step", TORCH_BOX(&fastebm::mclmc_step)); }
