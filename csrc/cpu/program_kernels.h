// The instructions of a fused program, for one instruction set: included by program_<isa>.cpp in a namespace of its own, under a
// `target` pragma, with FASTEBM_VECTOR floats to a vector. No template of the standard library is used here: its instances would carry
// wide instructions under names that the rest of the library shares. FASTEBM_TILES is 1 where there are matrix units.
//
// Values are float32 from the accumulators to the stores, whatever buffers hold. A block of at most 32 pixels and 32 channels stays in
// L1 (4 KB) while its epilogue runs over it.

#if FASTEBM_VECTOR == 16
typedef float Vector __attribute__((vector_size(64), aligned(4)));
#elif FASTEBM_VECTOR == 8
typedef float Vector __attribute__((vector_size(32), aligned(4)));
#else
typedef float Vector __attribute__((vector_size(16), aligned(4)));
#endif

#if FASTEBM_VECTOR == 16
constexpr int kPositions = 12, kPanel = 32;  // 24 accumulators of 32 registers
#elif FASTEBM_VECTOR == 8
constexpr int kPositions = 6, kPanel = 16;  // 12 of 16
#else
constexpr int kPositions = 2, kPanel = 16;  // 8 of 16
#endif
constexpr int kVectors = kPanel / FASTEBM_VECTOR;

static FASTEBM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static FASTEBM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- blocks

// Pixels that follow one another in a row (dx = 1) or are the same of consecutive images (dn = 1), in coordinates of the grid.
struct Run {
  int64_t n, dn, y, x, dx;
  int count;
};

struct Block {
  float* v;  // rows of 32
  int runs, channel, valid;  // the first channel, and how many there are
  Run run[32];
};

static FASTEBM_INLINE int64_t image_index(const Worker& w, const BufferRow& b, int64_t n) {
  return n - (b.images < w.job->header->chunk ? w.segment_start : w.chunk_start);
}

static FASTEBM_INLINE char* pixel_of(const Worker& w, const BufferRow& b, int64_t n, int64_t y, int64_t x) {
  return w.slot + b.offset + (image_index(w, b, n) * b.image + y * b.row + (b.margin + x) * b.pixel) * b.bytes;
}

// ---- rows of up to 32 channels, in float32 or bfloat16

static FASTEBM_INLINE float widened(uint16_t h) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(h) << 16)); }

// To the nearest, ties to even; NaN stays NaN.
static FASTEBM_INLINE uint16_t narrowed(float f) {
  const uint32_t u = static_cast<uint32_t>(bits_of(f));
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Calls f(i, value) for the channels of a row in memory. Full blocks have loops of fixed length, which vectorise best.
template <class F>
static FASTEBM_INLINE void for_each_channel(const char* p, int64_t bytes, int count, F f) {
  if (bytes == 2) {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    if (count == 32) {
#pragma GCC ivdep
      for (int i = 0; i < 32; ++i) f(i, widened(h[i]));
    } else {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) f(i, widened(h[i]));
    }
  } else {
    const float* h = reinterpret_cast<const float*>(p);
    if (count == 32) {
#pragma GCC ivdep
      for (int i = 0; i < 32; ++i) f(i, h[i]);
    } else {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) f(i, h[i]);
    }
  }
}

template <class F>
static FASTEBM_INLINE void store_channels(char* p, int64_t bytes, int count, F value) {
  if (bytes == 2) {
    uint16_t* h = reinterpret_cast<uint16_t*>(p);
    if (count == 32) {
#pragma GCC ivdep
      for (int i = 0; i < 32; ++i) h[i] = narrowed(value(i));
    } else {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) h[i] = narrowed(value(i));
    }
  } else {
    float* h = reinterpret_cast<float*>(p);
    if (count == 32) {
#pragma GCC ivdep
      for (int i = 0; i < 32; ++i) h[i] = value(i);
    } else {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) h[i] = value(i);
    }
  }
}

#if FASTEBM_VECTOR == 16
// A full row of 32 channels in two registers: what nearly all of a net's blocks are made of.
struct Row {
  __m512 low, high;
};

template <int bytes>
static FASTEBM_INLINE Row load_row(const char* p) {
  if constexpr (bytes == 2) {
    const __m512i h = _mm512_loadu_si512(p);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)), high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(low, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))};
  } else {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm512_loadu_ps(f), _mm512_loadu_ps(f + 16)};
  }
}

static FASTEBM_INLINE __m256i narrowed_vector(__m512 f) {
#if FASTEBM_TILES
  return (__m256i)_mm512_cvtneps_pbh(f);
#else
  const __m512i u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

template <int bytes>
static FASTEBM_INLINE void store_row(char* p, const Row& row) {
  if constexpr (bytes == 2) {
    const __m512i low = _mm512_castsi256_si512(narrowed_vector(row.low));
    _mm512_storeu_si512(p, _mm512_inserti64x4(low, narrowed_vector(row.high), 1));
  } else {
    float* f = reinterpret_cast<float*>(p);
    _mm512_storeu_ps(f, row.low);
    _mm512_storeu_ps(f + 16, row.high);
  }
}

// 1 / (1 + e^-x) as `sigmoid` below has it, with an estimate refined once in the place of the division.
static FASTEBM_INLINE __m512 sigmoid_vector(__m512 x) {
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-0x1.715476p+0f));
  t = _mm512_max_ps(_mm512_set1_ps(-126.0f), _mm512_min_ps(_mm512_set1_ps(126.0f), t));  // NaN, the second operand, stays
  const __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n)), r = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
}

// f(h) in the place of h, and f'(h).
static FASTEBM_INLINE __m512 silu_vector(__m512& h) {
  const __m512 s = sigmoid_vector(h);
  h = _mm512_mul_ps(h, s);
  return _mm512_fmadd_ps(h, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
}
#endif

// ---- activations

// 1 / (1 + e^-x) to 2e-7, finite for every finite x. Eight multiply-adds and, with AVX-512, a refined estimate for the division.
static FASTEBM_INLINE float power_of_two(float t) {  // |t| <= 126
  const float shifted = t + 0x1.8p+23f, f = t - (shifted - 0x1.8p+23f);
  float p = 1.5403530e-4f;  // log(2)^k / k!, k = 6 ... 0
  p = fused(p, f, 1.3333558e-3f);
  p = fused(p, f, 9.6181291e-3f);
  p = fused(p, f, 5.5504109e-2f);
  p = fused(p, f, 2.4022651e-1f);
  p = fused(p, f, 6.9314718e-1f);
  p = fused(p, f, 1.0f);
  return float_of(bits_of(p) + static_cast<int32_t>(static_cast<uint32_t>(bits_of(shifted)) << 23));
}

static FASTEBM_INLINE float sigmoid(float x) {
  float t = x * -0x1.715476p+0f;
  t = t < -126.0f ? -126.0f : t;
  t = t > 126.0f ? 126.0f : t;
  return 1.0f / (1.0f + power_of_two(t));
}

static FASTEBM_INLINE float hyperbolic_tangent(float x) {
  const float e = exponential_minus_one(x < 0 ? 2 * x : -2 * x), t = -e / (2 + e);
  return x < 0 ? -t : t;
}

static FASTEBM_INLINE float exponential_of(float x) {
  const float e = exponential(x < 0 ? x : -x);
  return x < 0 ? e : 1 / e;
}

template <Curve curve>
static FASTEBM_INLINE float curve_at(float x, const float* a) {
  if constexpr (curve == Curve::silu) return x * sigmoid(x);
  if constexpr (curve == Curve::gelu) return activated<Activation::gelu, 0>(x, 0.0f);
  if constexpr (curve == Curve::gelu_tanh) return activated<Activation::gelu_tanh, 0>(x, 0.0f);
  if constexpr (curve == Curve::elu) return a[1] * (x > 0 ? x : a[0] * exponential_minus_one(x > 0 ? 0.0f : a[2] * x));
  if constexpr (curve == Curve::leaky_relu) return x > 0 ? x : a[0] * x;
  if constexpr (curve == Curve::relu) return x <= 0 ? 0.0f : x;
  if constexpr (curve == Curve::softplus) return a[0] * x > a[1] ? x : __builtin_log1pf(__builtin_expf(a[0] * x)) / a[0];
  if constexpr (curve == Curve::tanh) return hyperbolic_tangent(x);
  if constexpr (curve == Curve::sigmoid) return sigmoid(x);
  if constexpr (curve == Curve::square) return x * x;
  return exponential_of(x);
}

// f'(h), where `of_result` means that h is f(x).
template <Curve curve>
static FASTEBM_INLINE float slope_at(float h, const float* a, bool of_result) {
  if constexpr (curve == Curve::silu) {
    const float s = sigmoid(h);
    return fused(h * s, 1.0f - s, s);
  }
  if constexpr (curve == Curve::gelu) return activated<Activation::gelu, 1>(h, 0.0f);
  if constexpr (curve == Curve::gelu_tanh) return activated<Activation::gelu_tanh, 1>(h, 0.0f);
  if constexpr (curve == Curve::elu) {
    const float below = of_result ? a[2] * (h + a[0] * a[1]) : a[0] * a[1] * a[2] * exponential(h > 0 ? 0.0f : a[2] * h);
    return h > 0 ? a[1] : below;
  }
  if constexpr (curve == Curve::leaky_relu) return h > 0 ? 1.0f : a[0];
  if constexpr (curve == Curve::relu) return h > 0 ? 1.0f : 0.0f;
  if constexpr (curve == Curve::softplus) return a[0] * h > a[1] ? 1.0f : sigmoid(a[0] * h);
  if constexpr (curve == Curve::tanh) {
    const float t = of_result ? h : hyperbolic_tangent(h);
    return fused(-t, t, 1.0f);
  }
  if constexpr (curve == Curve::sigmoid) {
    const float s = of_result ? h : sigmoid(h);
    return s * (1.0f - s);
  }
  if constexpr (curve == Curve::square) return 2 * h;
  return of_result ? h : exponential_of(h);
}

#define FASTEBM_EACH_CURVE(CALL)                               \
  switch (step.curve) {                                        \
    case Curve::silu: return CALL<Curve::silu> ARGUMENTS;      \
    case Curve::gelu: return CALL<Curve::gelu> ARGUMENTS;      \
    case Curve::gelu_tanh: return CALL<Curve::gelu_tanh> ARGUMENTS; \
    case Curve::elu: return CALL<Curve::elu> ARGUMENTS;        \
    case Curve::leaky_relu: return CALL<Curve::leaky_relu> ARGUMENTS; \
    case Curve::relu: return CALL<Curve::relu> ARGUMENTS;      \
    case Curve::softplus: return CALL<Curve::softplus> ARGUMENTS; \
    case Curve::tanh: return CALL<Curve::tanh> ARGUMENTS;      \
    case Curve::sigmoid: return CALL<Curve::sigmoid> ARGUMENTS; \
    case Curve::square: return CALL<Curve::square> ARGUMENTS;  \
    default: return CALL<Curve::exp> ARGUMENTS;                \
  }

static const float kNoParameters[3] = {0, 0, 0};

static FASTEBM_INLINE const float* parameters(const Worker& w, const EpilogueRow& step) {
  return step.number < 0 ? kNoParameters : w.job->numbers + step.number;
}

// ---- epilogues

// Calls f(row of the block, address of its pixel in the buffer) for every pixel of a block.
template <class F>
static FASTEBM_INLINE void for_each_pixel(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block, F f) {
  const BufferRow& b = w.job->buffers[step.buffer];
  const int64_t channel = step.channel + (step.spread ? 0 : block.channel);
  float* v = block.v;
  for (int r = 0; r < block.runs; ++r) {
    const Run& run = block.run[r];
    const int64_t y = (i.start_y + i.step_y * run.y) / step.factor_y;
    if (step.factor_x == 1 || run.dx == 0) {
      char* p = pixel_of(w, b, run.n, y, (i.start_x + i.step_x * run.x) / step.factor_x) + channel * b.bytes;
      const int64_t stride = (run.dn * b.image + run.dx * i.step_x * b.pixel) * b.bytes;
      for (int k = 0; k < run.count; ++k, p += stride, v += kBlock) f(v, p);
    } else {
      for (int k = 0; k < run.count; ++k, v += kBlock)
        f(v, pixel_of(w, b, run.n, y, (i.start_x + i.step_x * (run.x + k)) / step.factor_x) + channel * b.bytes);
    }
  }
}

static FASTEBM_INLINE int block_pixels(const Block& block) {
  int count = 0;
  for (int r = 0; r < block.runs; ++r) count += block.run[r].count;
  return count;
}

template <class F>
static FASTEBM_INLINE void each_value(const Block& block, F f) {
  const int count = block_pixels(block) * static_cast<int>(kBlock);
  float* __restrict v = block.v;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) v[i] = f(v[i]);
}

// How many numbers of a row are written: of the last block the filling behind the last channel of a buffer too, which is finite and has
// weight zero. Not more, because another worker may write the next panel.
static FASTEBM_INLINE int stored_count(const BufferRow& b, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  if (block.channel + block.valid < i.channels) return block.valid;
  const int64_t filled = least(b.pixel, b.image) - step.channel;
  const int64_t limit = step.channel + i.channels >= b.channels ? filled : i.channels;
  return static_cast<int>(least(kBlock, limit - block.channel));
}

template <Curve curve>
static void activate(const Worker& w, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  each_value(block, [&](float x) __attribute__((always_inline)) { return curve_at<curve>(x, parameter); });
}

template <Curve curve>
static void activate_keeping(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  const BufferRow& b = w.job->buffers[step.buffer];
  const int count = stored_count(b, i, step, block);
#if FASTEBM_VECTOR == 16
  if (curve == Curve::silu && count == kBlock) {
    for_each_pixel(w, i, step, block, [&](float* v, char* p) __attribute__((always_inline)) {
      Row h = load_row<4>(reinterpret_cast<const char*>(v));
      const Row slope = {silu_vector(h.low), silu_vector(h.high)};
      store_row<4>(reinterpret_cast<char*>(v), h);
      if (b.bytes == 2) store_row<2>(p, slope);
      else store_row<4>(p, slope);
    });
    return;
  }
#endif
  for_each_pixel(w, i, step, block, [&](float* __restrict v, char* p) __attribute__((always_inline)) {
    float slopes[kBlock];
    if constexpr (curve == Curve::silu) {
      // One logistic function serves both.
#pragma GCC ivdep
      for (int c = 0; c < kBlock; ++c) {
        const float x = v[c], s = sigmoid(x), f = x * s;
        slopes[c] = fused(f, 1.0f - s, s);
        v[c] = f;
      }
    } else {
#pragma GCC ivdep
      for (int c = 0; c < kBlock; ++c) {
        slopes[c] = slope_at<curve>(v[c], parameter, false);
        v[c] = curve_at<curve>(v[c], parameter);
      }
    }
    store_channels(p, b.bytes, count, [&](int c) __attribute__((always_inline)) { return slopes[c]; });
  });
}

template <Curve curve>
static void multiply_slope(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  const bool of_result = step.of_result != 0;
  const int64_t bytes = w.job->buffers[step.buffer].bytes;
  for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
    for_each_channel(p, bytes, block.valid, [&](int c, float h) __attribute__((always_inline)) {
      v[c] *= slope_at<curve>(h, parameter, of_result);
    });
  });
}

static void with_constant(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block, bool add) {
  const ConstantView& k = w.job->constants[step.number];
  const float* data = static_cast<const float*>(k.data);
  float* __restrict v = block.v;
  const int count = static_cast<int>(least(kBlock, k.channels - block.channel));
  for (int r = 0; r < block.runs; ++r) {
    const Run& run = block.run[r];
    const int64_t y = k.height > 1 ? i.start_y + i.step_y * run.y : 0;
    for (int p = 0; p < run.count; ++p, v += kBlock) {
      const int64_t x = k.width > 1 ? i.start_x + i.step_x * (run.x + p * run.dx) : 0;
      const float* __restrict c = data + (y * k.width + x) * k.channels + block.channel;
      if (add) {
        if (count == 32) for (int n = 0; n < 32; ++n) v[n] += c[n];
        else for (int n = 0; n < count; ++n) v[n] += c[n];
      } else {
        if (count == 32) for (int n = 0; n < 32; ++n) v[n] *= c[n];
        else for (int n = 0; n < count; ++n) v[n] *= c[n];
      }
    }
  }
}

#if FASTEBM_VECTOR == 16
template <int bytes>
static FASTEBM_INLINE void with_full_rows(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block, float factor) {
  const __m512 k = _mm512_set1_ps(factor);
  const bool add = step.action == Do::add;
  for_each_pixel(w, i, step, block, [&](float* v, const char* p) __attribute__((always_inline)) {
    Row h = load_row<4>(reinterpret_cast<const char*>(v));
    const Row other = load_row<bytes>(p);
    h.low = add ? _mm512_fmadd_ps(k, other.low, h.low) : _mm512_mul_ps(h.low, other.low);
    h.high = add ? _mm512_fmadd_ps(k, other.high, h.high) : _mm512_mul_ps(h.high, other.high);
    store_row<4>(reinterpret_cast<char*>(v), h);
  });
}
#endif

static void with_buffer(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const int64_t bytes = w.job->buffers[step.buffer].bytes;
  const float factor = step.number < 0 ? 1.0f : w.job->numbers[step.number];
#if FASTEBM_VECTOR == 16
  if (block.valid == kBlock && !step.spread) {
    if (bytes == 2) with_full_rows<2>(w, i, step, block, factor);
    else with_full_rows<4>(w, i, step, block, factor);
    return;
  }
#endif
  if (step.spread) {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      const float h = bytes == 2 ? widened(*reinterpret_cast<const uint16_t*>(p)) : *reinterpret_cast<const float*>(p);
      if (step.action == Do::add) for (int c = 0; c < kBlock; ++c) v[c] = fused(factor, h, v[c]);
      else for (int c = 0; c < kBlock; ++c) v[c] *= h;
    });
  } else if (step.action == Do::multiply) {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      for_each_channel(p, bytes, block.valid, [&](int c, float h) __attribute__((always_inline)) { v[c] *= h; });
    });
  } else {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      for_each_channel(p, bytes, block.valid, [&](int c, float h) __attribute__((always_inline)) { v[c] = fused(factor, h, v[c]); });
    });
  }
}

static void store(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const BufferRow& b = w.job->buffers[step.buffer];
  const int count = stored_count(b, i, step, block);
#if FASTEBM_VECTOR == 16
  if (count == kBlock) {
    for_each_pixel(w, i, step, block, [&](const float* v, char* p) __attribute__((always_inline)) {
      const Row row = load_row<4>(reinterpret_cast<const char*>(v));
      if (b.bytes == 2) store_row<2>(p, row);
      else store_row<4>(p, row);
    });
    return;
  }
#endif
  for_each_pixel(w, i, step, block, [&](const float* __restrict v, char* p) __attribute__((always_inline)) {
    store_channels(p, b.bytes, count, [&](int c) __attribute__((always_inline)) { return v[c]; });
  });
}

static void store_gradient(const Worker& w, const InstructionRow& i, const Block& block) {
  const ProgramJob& job = *w.job;
  const float* v = block.v;
  for (int r = 0; r < block.runs; ++r) {
    const Run& run = block.run[r];
    for (int k = 0; k < run.count; ++k, v += kBlock) {
      const int64_t y = i.start_y + i.step_y * run.y, x = i.start_x + i.step_x * (run.x + k * run.dx);
      float* out = job.gradient + (run.n + k * run.dn) * job.sample + block.channel * job.plane + y * job.width + x;
      for (int c = 0; c < block.valid; ++c) out[c * job.plane] = v[c];
    }
  }
}

static void store_energies(const Worker& w, const Block& block) {
  const float* v = block.v;
  for (int r = 0; r < block.runs; ++r)
    for (int k = 0; k < block.run[r].count; ++k, v += kBlock) w.job->energies[block.run[r].n + k * block.run[r].dn] = v[0];
}

static void do_step(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  switch (step.action) {
    case Do::add_constant: return with_constant(w, i, step, block, true);
    case Do::multiply_constant: return with_constant(w, i, step, block, false);
    case Do::scale: {
      const float factor = w.job->numbers[step.number];
      return each_value(block, [=](float x) __attribute__((always_inline)) { return x * factor; });
    }
    case Do::add:
    case Do::multiply: return with_buffer(w, i, step, block);
    case Do::activate:
#define ARGUMENTS (w, step, block)
      FASTEBM_EACH_CURVE(activate)
#undef ARGUMENTS
    case Do::activate_keeping:
#define ARGUMENTS (w, i, step, block)
      FASTEBM_EACH_CURVE(activate_keeping)
    case Do::slope:
      FASTEBM_EACH_CURVE(multiply_slope)
#undef ARGUMENTS
    case Do::store: return store(w, i, step, block);
    case Do::store_gradient: return store_gradient(w, i, block);
    case Do::store_energies: return store_energies(w, block);
  }
}

static void epilogue(const Worker& w, const InstructionRow& i, const Block& block) {
  const EpilogueRow* step = w.job->epilogues + i.first;
  for (int64_t k = 0; k < i.count; ++k) do_step(w, i, step[k], block);
}

// ---- sharing out an instruction within a team

struct Range {
  int64_t begin, end;
};

static FASTEBM_INLINE Range share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Panels first, whose weights a worker then reads alone; where there are too few, the pixels.
static FASTEBM_INLINE void share_convolution(const Worker& w, int64_t panels, int64_t units, Range& panel, Range& unit) {
  panel = {0, panels};
  unit = {0, units};
  if (panels >= w.parts) panel = share(panels, w.part, w.parts);
  else unit = share(units, w.part, w.parts);
}

// ---- everything but convolutions: blocks of up to 32 pixels of a row

static void softmax_pixel(const float* in, int64_t count, float* out, bool log_sum) {
  float largest = in[0], sum = 0;
  for (int64_t c = 1; c < count; ++c) largest = in[c] > largest ? in[c] : largest;
  for (int64_t c = 0; c < count; ++c) sum += __builtin_expf(in[c] - largest);
  if (log_sum) out[0] = largest + __builtin_logf(sum);
  else
    for (int64_t c = 0; c < count; ++c) out[c] = __builtin_expf(in[c] - largest) / sum;
}

static FASTEBM_INLINE float number_at(const char* p, int64_t bytes) {
  return bytes == 2 ? widened(*reinterpret_cast<const uint16_t*>(p)) : *reinterpret_cast<const float*>(p);
}

static void load_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0, int valid) {
  const ProgramJob& job = *w.job;
  const float* in = job.x + n * job.sample + y * job.width + x;
  for (int c = 0; c < valid; ++c) v[c] = c0 + c < i.source_channels ? in[(c0 + c) * job.plane] : 1.0f;
}

static void gather_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0, int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  const int64_t sy = y - i.pad_y, sx = x - i.pad_x;
  if (sy < 0 || sx < 0 || sy >= b.height * i.kernel_y || sx >= b.width * i.kernel_x) {
    const float fill = i.constant < 0 ? 0.0f : w.job->numbers[i.constant];
    for (int c = 0; c < valid; ++c) v[c] = fill;
    return;
  }
  const char* p = pixel_of(w, b, n, sy / i.kernel_y, sx / i.kernel_x) + (i.source_channel + (i.spread ? 0 : c0)) * b.bytes;
  if (i.spread) {
    const float h = number_at(p, b.bytes);
    for (int c = 0; c < valid; ++c) v[c] = h;
  } else {
    for_each_channel(p, b.bytes, valid, [&](int c, float h) __attribute__((always_inline)) { v[c] = h; });
  }
}

static void pool_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0, int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  for (int64_t ky = 0; ky < i.kernel_y; ++ky) {
    const int64_t sy = y * i.stride_y - i.pad_y + ky;
    if (sy < 0 || sy >= b.height) continue;
    for (int64_t kx = 0; kx < i.kernel_x; ++kx) {
      const int64_t sx = x * i.stride_x - i.pad_x + kx;
      if (sx < 0 || sx >= b.width) continue;
      for_each_channel(pixel_of(w, b, n, sy, sx) + (i.source_channel + c0) * b.bytes, b.bytes, valid,
                       [&](int c, float h) __attribute__((always_inline)) { v[c] += h; });
    }
  }
}

static void softmax_block(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0, int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  float in[1024], out[1024];
  const int64_t count = least(i.source_channels, 1024);
  const char* p = pixel_of(w, b, n, y, x) + i.source_channel * b.bytes;
  for (int64_t c = 0; c < count; ++c) in[c] = number_at(p + c * b.bytes, b.bytes);
  softmax_pixel(in, count, out, i.kind == Kind::log_sum_exp);
  for (int c = 0; c < valid; ++c) v[c] = out[c0 + c];
}

static void pixelwise(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  alignas(64) float v[kBlock * kBlock];
  const Range rows = share((end - begin) * i.height, w.part, w.parts);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t n = begin + row / i.height, y = row % i.height;
    for (int64_t x0 = 0; x0 < i.width; x0 += kBlock) {
      const int count = static_cast<int>(least(kBlock, i.width - x0));
      for (int64_t c0 = 0; c0 < i.channels; c0 += kBlock) {
        const int valid = static_cast<int>(least(kBlock, i.channels - c0));
        for (int k = 0; k < count * kBlock; ++k) v[k] = 0;
        for (int k = 0; k < count; ++k) {
          float* p = v + k * kBlock;
          switch (i.kind) {
            case Kind::load: load_pixel(w, i, p, n, y, x0 + k, c0, valid); break;
            case Kind::gather: gather_pixel(w, i, p, n, y, x0 + k, c0, valid); break;
            case Kind::pool: pool_pixel(w, i, p, n, y, x0 + k, c0, valid); break;
            default: softmax_block(w, i, p, n, y, x0 + k, c0, valid);
          }
        }
        Block block{v, 1, static_cast<int>(c0), valid, {}};
        block.run[0] = {n, 0, y, x0, 1, count};
        epilogue(w, i, block);
      }
    }
  }
}

// ---- convolutions by fused multiply-adds: pixels broadcast, a panel of outputs in registers

alignas(64) static const float kZeros[512] = {};

static FASTEBM_INLINE Vector multiply_add(float a, Vector b, Vector c) {
#if FASTEBM_VECTOR == 16
  return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif FASTEBM_VECTOR == 8
  return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Adds inputs [0, count) of one tap to the accumulators of all positions.
static FASTEBM_INLINE void tap(Vector (&acc)[kPositions][kVectors], const float* const (&a)[kPositions], const float* __restrict b, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    Vector weight[kVectors];
    for (int j = 0; j < kVectors; ++j) weight[j] = *reinterpret_cast<const Vector*>(b + c * kPanel + j * FASTEBM_VECTOR);
#pragma GCC unroll 16
    for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[p][j] = multiply_add(a[p][c], weight[j], acc[p][j]);
  }
}

static void convolution_panels(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  const BufferRow& source = w.job->buffers[i.source];
  const float* weights = static_cast<const float*>(w.job->constants[i.constant].data);
  const int64_t plane = i.height * i.width, pixels = (end - begin) * plane;
  const int64_t panels = (i.channels + kPanel - 1) / kPanel, taps = i.kernel_y * i.kernel_x;
  Range panel_range, unit_range;
  share_convolution(w, panels, (pixels + kPositions - 1) / kPositions, panel_range, unit_range);
  constexpr int64_t kInputs = 256;  // of bfloat16 inputs so many are widened at a time: 12 KB
  alignas(64) float v[kPositions * kBlock];
  alignas(64) float wide[kPositions][kInputs];
  for (int64_t unit = unit_range.begin; unit < unit_range.end; ++unit) {
    const int64_t first = unit * kPositions;
    const int positions = static_cast<int>(least(kPositions, pixels - first));
    Block block{v, 0, 0, 0, {}};
    const char* window[kPositions];  // where the first tap reads, or would read
    int64_t top[kPositions], left[kPositions];
    for (int p = 0; p < kPositions; ++p) {
      const int64_t q = first + (p < positions ? p : positions - 1);
      const int64_t n = begin + q / plane, y = q % plane / i.width, x = q % i.width;
      top[p] = y * i.stride_y - i.pad_y;
      left[p] = x * i.stride_x - i.pad_x;
      window[p] = pixel_of(w, source, n, 0, 0) + (top[p] * source.row + left[p] * source.pixel + i.source_channel) * source.bytes;
      if (p >= positions) continue;
      if (p == 0 || x == 0) block.run[block.runs++] = {n, 0, y, x, 1, 0};
      ++block.run[block.runs - 1].count;
    }
    for (int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
      Vector acc[kPositions][kVectors] = {};
      const float* b = weights + panel * taps * i.source_channels * kPanel;
      for (int64_t ky = 0, t = 0; ky < i.kernel_y; ++ky) for (int64_t kx = 0; kx < i.kernel_x; ++kx, ++t) {
        const int64_t down = ky * i.dilation_y, right = kx * i.dilation_x;
        const int64_t offset = (down * source.row + right * source.pixel) * source.bytes;
        const char* base[kPositions];
        bool any = false;
        for (int p = 0; p < kPositions; ++p) {
          const uint64_t y = static_cast<uint64_t>(top[p] + down), x = static_cast<uint64_t>(left[p] + right);
          const bool inside = y < static_cast<uint64_t>(source.height) && x < static_cast<uint64_t>(source.width);
          base[p] = inside ? window[p] + offset : nullptr;
          any |= inside;
        }
        if (!any) continue;
        for (int64_t c = 0; c < i.source_channels; c += kInputs) {
          const int64_t count = least(kInputs, i.source_channels - c);
          const float* a[kPositions];
          for (int p = 0; p < kPositions; ++p) {
            if (base[p] == nullptr) {
              a[p] = kZeros;
            } else if (source.bytes == 4) {
              a[p] = reinterpret_cast<const float*>(base[p]) + c;
            } else {
              const uint16_t* h = reinterpret_cast<const uint16_t*>(base[p]) + c;
              for (int64_t k = 0; k < count; ++k) wide[p][k] = widened(h[k]);
              a[p] = wide[p];
            }
          }
          tap(acc, a, b + (t * i.source_channels + c) * kPanel, count);
        }
      }
      for (int p = 0; p < kPositions; ++p) {
        for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(v + p * kBlock + j * FASTEBM_VECTOR) = acc[p][j];
        for (int c = kPanel; c < kBlock; ++c) v[p * kBlock + c] = 0;
      }
      block.channel = static_cast<int>(panel * kPanel);
      block.valid = static_cast<int>(least(kPanel, i.channels - block.channel));
      epilogue(w, i, block);
    }
  }
}

#if FASTEBM_TILES
#include "program_tiles.h"
#endif

// ---- one instruction

// Zeros on both sides of the rows that convolutions with padding read, and behind dense ones what a tile may read.
static void clear_margins(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < i.count; ++k) {
    const EpilogueRow& step = w.job->epilogues[i.first + k];
    if (step.action != Do::store) continue;
    const BufferRow& b = w.job->buffers[step.buffer];
    const int64_t left = b.margin * b.pixel * b.bytes, right = (b.row - (b.margin + b.width) * b.pixel) * b.bytes;
    if (left + right == 0) continue;
    if (b.image < b.pixel) {  // images lie pixel by pixel beside each other
      for (int64_t n = begin; n < end; ++n)
        for (int64_t y = 0; y < b.height; ++y)
          for (int64_t x = 0; x < b.margin; ++x) {
            __builtin_memset(pixel_of(w, b, n, y, x - b.margin), 0, b.image * b.bytes);
            __builtin_memset(pixel_of(w, b, n, y, b.width + x), 0, b.image * b.bytes);
          }
      continue;
    }
    for (int64_t n = begin; n < end; ++n)
      for (int64_t y = 0; y < b.height; ++y) {
        __builtin_memset(pixel_of(w, b, n, y, 0) - left, 0, left);
        __builtin_memset(pixel_of(w, b, n, y, b.width), 0, right);
      }
  }
}

static void execute(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  if (i.kind != Kind::convolution) pixelwise(w, i, begin, end);
#if FASTEBM_TILES
  else if (w.job->header->layout == Layout::tiles) convolution_tiles(w, i, begin, end);
#endif
  else convolution_panels(w, i, begin, end);
  if (w.part == 0) clear_margins(w, i, begin, end);
}
