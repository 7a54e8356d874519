// What MALA, underdamped dynamics and HMC do between two runs of a lane program: the arithmetic of mala.cpp and underdamped.cpp,
// bit for bit, for the chains of a block side by side. lanes_variant.h includes it as it does lanes_execute.h.

// A sum over the elements of each chain in the order of langevin.cpp, in float64: term.add(sum, e, width) adds element e. The
// first row of `rows` holds the result.
template <class Term>
static void ordered_sum(double* rows, int64_t sample, int64_t width, const Term& term) {
  int64_t leaves = 1, level_of = 0;
  while (leaves < sample && leaves < kFoldLanes) leaves *= 2, ++level_of;
  int64_t filled = 0;
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    int64_t first = 0;  // the leaf's number with its bits in reverse
    for (int64_t b = 0; b < level_of; ++b) first |= (leaf >> b & 1) << (level_of - 1 - b);
    double* __restrict sum = rows + filled++ * width;
    for (int64_t l = 0; l < width; ++l) sum[l] = 0.0;
    for (int64_t e = first; e < sample; e += kFoldLanes) term.add(sum, e, width);
    for (int64_t done = leaf + 1; done % 2 == 0; done /= 2) {
      double* __restrict left = rows + (filled - 2) * width;
      const double* __restrict right = rows + (filled - 1) * width;
      for (int64_t l = 0; l < width; ++l) left[l] += right[l];
      --filled;
    }
  }
}

// The logarithm of the uniform number of each chain's test is below its ratio, and the proposal's energy is finite.
static void accept(const LaneMove& move, const float* found, int64_t width) {
  LaneUpdate at = move.noise;
  at.ids_high = move.acceptance;
  alignas(64) uint32_t bits[1][4][16];
  alignas(64) float logs[16], taken[16];
  alignas(64) double below[16];
  for (int64_t lane = 0; lane < width; lane += 16) {
    draw_group<1>(bits, 0, 0, lane, at);
    const uint32_t* __restrict words = bits[0][0];
    for (int i = 0; i < 16; ++i) logs[i] = minus_two_log(uniform_from_bits(words[i]));
    // Rows have room for all 16 lanes, also those of a single chain. Short loops of one type each become vectors.
    const double* __restrict ratio = move.log_ratio + lane;
    for (int i = 0; i < 16; ++i) below[i] = -0.5 * static_cast<double>(logs[i]) < ratio[i] ? 1.0 : 0.0;
    const int64_t n = least(16, width - lane);
    const float *__restrict energy = found + lane, *__restrict rejected = move.rejected + lane;
    for (int i = 0; i < 16; ++i) taken[i] = static_cast<float>(below[i]);
    for (int64_t i = 0; i < n; ++i) taken[i] = energy[i] - energy[i] == 0.0f && rejected[i] == 0.0f ? taken[i] : 0.0f;
    for (int64_t i = 0; i < n; ++i) move.taken[lane + i] = taken[i];
    for (int64_t i = 0; i < n; ++i) move.accepted[lane + i] = taken[i] != 0.0f;
  }
}

static FASTEBM_INLINE void keep_accepted(float* __restrict kept, const float* __restrict found, const float* __restrict taken,
                                         int64_t sample, int64_t width) {
  for (int64_t e = 0; e < sample; ++e)
    for (int64_t l = 0; l < width; ++l) kept[e * width + l] = taken[l] != 0 ? found[e * width + l] : kept[e * width + l];
}

static void keep(const LaneProgram& program, const float* arena, int64_t width, const LaneMove& move) {
  const int64_t sample = program.header->sample;
  const float* energy = arena + program.header->energy * width;
  keep_accepted(move.x, arena, move.taken, sample, width);
  keep_accepted(move.gradient, arena + program.header->gradient * width, move.taken, sample, width);
  keep_accepted(move.energy, energy, move.taken, 1, width);
}

// Entries that a mask holds have gradient zero.
static FASTEBM_INLINE void hold(float* __restrict gradient, const LaneMove& move, int64_t numbers) {
  if (!move.mask) return;
  const float* __restrict mask = move.mask;
  for (int64_t i = 0; i < numbers; ++i) gradient[i] = mask[i] != 0 ? 0.0f : gradient[i];
}

// ---- MALA

static void propose(const LaneProgram& program, float* arena, int64_t width, const LaneMove& move) {
  const int64_t numbers = program.header->sample * width;
  float* gradient = arena + program.header->gradient * width;
  for (int64_t i = 0; i < numbers; ++i) arena[i] = move.x[i];
  for (int64_t i = 0; i < numbers; ++i) gradient[i] = move.gradient[i];
  update(program, arena, width, move.noise);
  if (move.mask)
    for (int64_t i = 0; i < numbers; ++i) arena[i] = move.mask[i] != 0 ? move.x[i] : arena[i];
  if (!move.walled) return;
  const float low = move.low, high = move.high;
  for (int64_t i = 0; i < numbers; ++i) move.unfolded[i] = arena[i];
  for (int64_t i = 0; i < numbers; ++i) {
    const float y = arena[i];
    arena[i] = y < low ? 2 * low - y : y > high ? 2 * high - y : y;
  }
}

struct ProposalTerm {
  const float *x, *gradient, *proposal, *slope, *eta;
  float limit;  // infinite without a clip
  FASTEBM_INLINE void add(double* __restrict sum, int64_t e, int64_t width) const {
    const float *__restrict here = x + e * width, *__restrict there = proposal + e * width;
    const float *__restrict g = gradient + e * width, *__restrict h = slope + e * width, *__restrict step = eta;
    for (int64_t l = 0; l < width; ++l) {
      const double a = bounded_by(g[l], -limit, limit), b = bounded_by(h[l], -limit, limit);
      const double w = static_cast<double>(there[l]) - static_cast<double>(here[l]);
      sum[l] = fused(fused(static_cast<double>(step[l]), b - a, -2 * w), a + b, sum[l]);
    }
  }
};

// The same where a mirrored entry's velocity turned round: `unfolded` is the proposal before walls mirrored it.
struct MirroredTerm {
  ProposalTerm plain;
  const float* unfolded;
  float low, high;
  FASTEBM_INLINE void add(double* __restrict sum, int64_t e, int64_t width) const {
    const int64_t at = e * width;
    for (int64_t l = 0; l < width; ++l) {
      const double a = bounded_by(plain.gradient[at + l], -plain.limit, plain.limit);
      const double b = bounded_by(plain.slope[at + l], -plain.limit, plain.limit);
      const float y = unfolded[at + l];
      const bool mirrored = y < low || y > high;
      const double w = static_cast<double>(y) - static_cast<double>(plain.x[at + l]), difference = b - a, total = a + b;
      const double outer = mirrored ? difference : total, inner = mirrored ? total : difference;
      sum[l] = fused(fused(static_cast<double>(plain.eta[l]), inner, mirrored ? 2 * w : -2 * w), outer, sum[l]);
    }
  }
};

static void test_proposal(const LaneProgram& program, float* arena, int64_t width, const LaneMove& move) {
  const int64_t sample = program.header->sample;
  const float* energy = arena + program.header->energy * width;
  float* slope = arena + program.header->gradient * width;
  hold(slope, move, sample * width);
  const float limit = move.noise.clips ? move.noise.grad_clip : __builtin_inff();
  const ProposalTerm term{move.x, move.gradient, arena, slope, move.noise.step_size, limit};
  if (move.walled) ordered_sum(move.sums, sample, width, MirroredTerm{term, move.unfolded, move.low, move.high});
  else ordered_sum(move.sums, sample, width, term);
  for (int64_t l = 0; l < width; ++l) move.rejected[l] = 0.0f;
  if (move.walled)
    for (int64_t e = 0; e < sample; ++e)
      for (int64_t l = 0; l < width; ++l) {
        const float x = arena[e * width + l];
        move.rejected[l] = x < move.low || x > move.high ? 1.0f : move.rejected[l];
      }
  for (int64_t l = 0; l < width; ++l) {
    const double eta = move.noise.step_size[l], sigma = move.noise.noise_std[l], heat = sigma * sigma / (2 * eta);
    const double change = static_cast<double>(energy[l]) - static_cast<double>(move.energy[l]);
    move.log_ratio[l] = move.rejected[l] != 0 ? -__builtin_inf() : -(change + move.sums[l] / 4) / heat;
  }
  accept(move, energy, width);
  keep(program, arena, width, move);
}

// ---- velocities

// velocity = sqrt(temperature) * sqrt(inverse mass) * noise.
static void refresh(const LaneProgram& program, float* arena, int64_t width, const LaneMove& move) {
  const int64_t sample = program.header->sample, row = width == 1 ? kLaneRow : width, rows = width == 1 ? 1 : 4;
  LaneUpdate at = move.noise;
  at.ids_high = move.refresh;
  for (int64_t e = 0; e < sample; e += width == 1 ? kLaneRow : 4) {
    draw_rows(e, sample, width, at);
    for (int64_t r = 0; r < rows && e + r < sample; ++r) {
      const int64_t first = (e + r) * width, n = least(row, sample * width - first);
      for (int64_t l = 0; l < n; ++l) {
        const float scale = move.inverse_mass ? move.heat[l] * rounded_sqrt(move.inverse_mass[first + l]) : move.heat[l];
        move.velocity[first + l] = at.noise[r * row + l] * scale;
      }
    }
  }
}

// What changes with the row of a schedule, for n numbers of a row.
static FASTEBM_INLINE void kick(float* __restrict v, const float* __restrict g, const float* __restrict h, const float* mass,
                                int64_t n) {
  if (mass)
    for (int64_t l = 0; l < n; ++l) v[l] = fused(-((h[l] * 0.5f) * mass[l]), g[l], v[l]);
  else
    for (int64_t l = 0; l < n; ++l) v[l] = fused(-(h[l] * 0.5f), g[l], v[l]);
}

static FASTEBM_INLINE void drift(float* __restrict x, float* __restrict v, const float* __restrict duration, const LaneMove& move,
                                 int64_t n) {
  for (int64_t l = 0; l < n; ++l) {
    const float moved = fused(duration[l], v[l], x[l]);
    x[l] = duration[l] != 0 ? moved : x[l];
  }
  if (!move.walled) return;
  for (int64_t l = 0; l < n; ++l) {
    const bool below = duration[l] != 0 && x[l] < move.low, above = duration[l] != 0 && x[l] > move.high;
    const float mirrored = below ? 2 * move.low - x[l] : above ? 2 * move.high - x[l] : x[l];
    // Beyond the other wall too: no number, which ends the trajectory.
    x[l] = (below || above) && (mirrored < move.low || mirrored > move.high) ? __builtin_nanf("") : mirrored;
    v[l] = below || above ? -v[l] : v[l];
  }
}

static FASTEBM_INLINE void mix(float* __restrict v, const float* __restrict xi, const float* __restrict decay,
                               const float* __restrict sigma, const float* mass, int64_t n) {
  for (int64_t l = 0; l < n; ++l) {
    const float scale = mass ? sigma[l] * rounded_sqrt(mass[l]) : sigma[l], kept = decay[l] * v[l];
    const float mixed = fused(scale, xi[l], kept);
    v[l] = sigma[l] == 0.0f ? kept : mixed;
  }
}

struct KineticTerm {
  const float *velocity, *inverse_mass;
  void add(double* __restrict sum, int64_t e, int64_t width) const {
    const int64_t at = e * width;
    for (int64_t l = 0; l < width; ++l) {
      const double v = velocity[at + l], square = v * v;
      const double w = inverse_mass ? static_cast<double>(inverse_mass[at + l]) : 1.0;
      sum[l] += w == 0 ? 0.0 : square / w;
    }
  }
};

static void count_kinetic(const LaneMove& move, int64_t sample, int64_t width, double sign) {
  ordered_sum(move.sums, sample, width, KineticTerm{move.velocity, move.inverse_mass});
  for (int64_t l = 0; l < width; ++l) move.work[l] += sign * (0.5 * move.sums[l]);
}

static bool mixes(const float* decay, const float* sigma, int64_t width) {
  for (int64_t l = 0; l < width; ++l)
    if (decay[l] != 1.0f || sigma[l] != 0.0f) return true;
  return false;
}

static void kinetic(const LaneProgram& program, float* arena, int64_t width, const LaneMove& move, bool halves, bool close, bool open,
                    bool counted) {
  const int64_t sample = program.header->sample, row = width == 1 ? kLaneRow : width, rows = width == 1 ? 1 : 4;
  const int64_t step = width == 1 ? kLaneRow : 4, numbers = sample * width;
  float *x = arena, *v = move.velocity, *gradient = arena + program.header->gradient * width;
  const float* w = move.inverse_mass;
  hold(gradient, move, numbers);
  LaneUpdate at = move.noise;
  if (close) {
    for (int64_t i = 0; i < numbers; i += row) kick(v + i, gradient + i, move.h_before, w ? w + i : nullptr, least(row, numbers - i));
    if (counted) count_kinetic(move, sample, width, 1.0);
    if (halves && mixes(move.decay_before, move.sigma_before, width)) {
      at.ids_high = move.end;
      at.step = move.noise.step - 1;
      for (int64_t e = 0; e < sample; e += step) {
        draw_rows(e, sample, width, at);
        for (int64_t r = 0; r < rows && e + r < sample; ++r) {
          const int64_t i = (e + r) * width;
          mix(v + i, at.noise + r * row, move.decay_before, move.sigma_before, w ? w + i : nullptr, least(row, numbers - i));
        }
      }
    }
  }
  if (!open) return;
  at.ids_high = move.begin;
  at.step = move.noise.step;
  const bool mixed = mixes(move.decay, move.sigma, width);
  if (halves && mixed)
    for (int64_t e = 0; e < sample; e += step) {
      draw_rows(e, sample, width, at);
      for (int64_t r = 0; r < rows && e + r < sample; ++r) {
        const int64_t i = (e + r) * width;
        mix(v + i, at.noise + r * row, move.decay, move.sigma, w ? w + i : nullptr, least(row, numbers - i));
      }
    }
  if (counted) count_kinetic(move, sample, width, -1.0);
  for (int64_t e = 0; e < sample; e += step) {
    if (!halves && mixed) draw_rows(e, sample, width, at);
    for (int64_t r = 0; r < rows && e + r < sample; ++r) {
      const int64_t i = (e + r) * width, n = least(row, numbers - i);
      const float* mass = w ? w + i : nullptr;
      kick(v + i, gradient + i, move.h, mass, n);
      if (halves || !mixed) {
        drift(x + i, v + i, move.h, move, n);
        continue;
      }
      // Chains without friction take the whole step at once, as leapfrog does, whatever their neighbours do.
      alignas(64) float first[kMaxWidth], second[kMaxWidth];
      for (int64_t l = 0; l < n; ++l) {
        const bool plain = move.decay[l] == 1.0f && move.sigma[l] == 0.0f;
        first[l] = plain ? move.h[l] : move.h[l] * 0.5f;
        second[l] = plain ? 0.0f : move.h[l] * 0.5f;
      }
      drift(x + i, v + i, first, move, n);
      mix(v + i, at.noise + r * row, move.decay, move.sigma, mass, n);
      drift(x + i, v + i, second, move, n);
    }
  }
}

static void test_trajectory(const LaneProgram& program, float* arena, int64_t width, const LaneMove& move) {
  const float* energy = arena + program.header->energy * width;
  for (int64_t l = 0; l < width; ++l) {
    const double change = static_cast<double>(energy[l]) - static_cast<double>(move.energy[l]);
    move.log_ratio[l] = -(change + move.work[l]) / move.temperature[l];
    move.rejected[l] = 0.0f;
  }
  accept(move, energy, width);
  keep(program, arena, width, move);
}
