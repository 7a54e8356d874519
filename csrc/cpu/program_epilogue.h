// The epilogue of an instruction: the pointwise operations on a block of values, which end in stores.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_activations.h"
#include "program_blocks.h"
#include "program_rows.h"

static const float kNoParameters[3] = {0, 0, 0};

static FASTEBM_INLINE const float* parameters(const Worker& w, const EpilogueRow& step) {
  return step.number < 0 ? kNoParameters : w.job->numbers + step.number;
}

static FASTEBM_INLINE int block_pixels(const Block& block) {
  int count = 0;
  for (int r = 0; r < block.runs; ++r) count += block.run[r].count;
  return count;
}

// Numbers of a row that are computed: those behind the channels are filling.
static FASTEBM_INLINE int row_numbers(const Block& block) { return static_cast<int>(block.valid > kBlock / 2 ? kBlock : kBlock / 2); }

template <class F>
static FASTEBM_INLINE void each_value(const Block& block, F f) {
  const int pixels = block_pixels(block);
  float* __restrict v = block.v;
  if (row_numbers(block) == kBlock) {
#pragma GCC ivdep
    for (int i = 0; i < pixels * kBlock; ++i) v[i] = f(v[i]);
  } else {
    for (int p = 0; p < pixels; ++p)
#pragma GCC ivdep
      for (int i = 0; i < kBlock / 2; ++i) v[p * kBlock + i] = f(v[p * kBlock + i]);
  }
}

// How many numbers of a row are written: of the last block the filling behind the last channel of a buffer too, so that rows are
// whole vectors. Only tiles over dense images read it, and find zeros. Not more, because another worker may write the next panel.
static FASTEBM_INLINE int stored_count(const BufferRow& b, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  if (block.channel + block.valid < i.channels) return block.valid;
  const int64_t filled = least(b.pixel_stride, b.image_stride) - step.channel;
  const int64_t limit = step.channel + i.channels >= b.channels ? filled : i.channels;
  return static_cast<int>(least(kBlock, limit - block.channel));
}

template <Activation kind>
static void activate(const Worker& w, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  each_value(block, [&](float x) __attribute__((always_inline)) { return activation_at<kind>(x, parameter); });
}

template <Activation kind>
static void activate_keeping(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  const BufferRow& b = w.job->buffers[step.buffer];
  const int count = stored_count(b, i, step, block);
#if FASTEBM_VECTOR == 16
  if (kind == Activation::silu && count == kBlock) {
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
    for_each_of(row_numbers(block), [&](int c) __attribute__((always_inline)) {
      if constexpr (kind == Activation::silu) {  // one logistic function serves both
        const float x = v[c], s = sigmoid(x), f = x * s;
        slopes[c] = fused(f, 1.0f - s, s);
        v[c] = f;
      } else {
        slopes[c] = derivative_at<kind>(v[c], parameter, false);
        v[c] = activation_at<kind>(v[c], parameter);
      }
    });
    store_channels(p, b.bytes, count, [&](int c) __attribute__((always_inline)) { return c < block.valid ? slopes[c] : 0.0f; });
  });
}

template <Activation kind>
static void multiply_slope(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block) {
  const float* a = parameters(w, step);
  const float parameter[3] = {a[0], step.number < 0 ? 0 : a[1], step.number < 0 ? 0 : a[2]};
  const bool of_result = step.of_result != 0;
  const int64_t bytes = w.job->buffers[step.buffer].bytes;
  for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
    for_each_channel(p, bytes, block.valid, [&](int c, float h) __attribute__((always_inline)) {
      v[c] *= derivative_at<kind>(h, parameter, of_result);
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
      if (add) for_each_of(count, [&](int n) __attribute__((always_inline)) { v[n] += c[n]; });
      else for_each_of(count, [&](int n) __attribute__((always_inline)) { v[n] *= c[n]; });
    }
  }
}

#if FASTEBM_VECTOR == 16
template <int bytes>
static FASTEBM_INLINE void with_full_rows(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block,
                                          float factor) {
  const __m512 k = _mm512_set1_ps(factor);
  const bool add = step.op == EpilogueOp::add;
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
  if (block.valid == kBlock && !step.broadcast) {
    if (bytes == 2) with_full_rows<2>(w, i, step, block, factor);
    else with_full_rows<4>(w, i, step, block, factor);
    return;
  }
#endif
  if (step.broadcast) {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      const float h = bytes == 2 ? widened(*reinterpret_cast<const uint16_t*>(p)) : *reinterpret_cast<const float*>(p);
      const int count = row_numbers(block);
      if (step.op == EpilogueOp::add)
        for_each_of(count, [&](int c) __attribute__((always_inline)) { v[c] = fused(factor, h, v[c]); });
      else
        for_each_of(count, [&](int c) __attribute__((always_inline)) { v[c] *= h; });
    });
  } else if (step.op == EpilogueOp::multiply) {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      for_each_channel(p, bytes, block.valid, [&](int c, float h) __attribute__((always_inline)) { v[c] *= h; });
    });
  } else {
    for_each_pixel(w, i, step, block, [&](float* __restrict v, const char* p) __attribute__((always_inline)) {
      for_each_channel(p, bytes, block.valid,
                       [&](int c, float h) __attribute__((always_inline)) { v[c] = fused(factor, h, v[c]); });
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
    store_channels(p, b.bytes, count, [&](int c) __attribute__((always_inline)) { return c < block.valid ? v[c] : 0.0f; });
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
  switch (step.op) {
    case EpilogueOp::add_constant: return with_constant(w, i, step, block, true);
    case EpilogueOp::multiply_constant: return with_constant(w, i, step, block, false);
    case EpilogueOp::scale: {
      const float factor = w.job->numbers[step.number];
      return each_value(block, [=](float x) __attribute__((always_inline)) { return x * factor; });
    }
    case EpilogueOp::add:
    case EpilogueOp::multiply: return with_buffer(w, i, step, block);
    case EpilogueOp::activate:
#define ARGUMENTS (w, step, block)
      FASTEBM_EACH_ACTIVATION(activate)
#undef ARGUMENTS
    case EpilogueOp::activate_keeping:
#define ARGUMENTS (w, i, step, block)
      FASTEBM_EACH_ACTIVATION(activate_keeping)
    case EpilogueOp::slope: FASTEBM_EACH_ACTIVATION(multiply_slope)
#undef ARGUMENTS
    case EpilogueOp::store: return store(w, i, step, block);
    case EpilogueOp::store_gradient: return store_gradient(w, i, block);
    case EpilogueOp::store_energies: return store_energies(w, block);
  }
}

static void epilogue(const Worker& w, const InstructionRow& i, const Block& block) {
  const EpilogueRow* step = w.job->epilogues + i.first;
  for (int64_t k = 0; k < i.count; ++k) do_step(w, i, step[k], block);
}

// Fetches what an epilogue will read and write while the products are still being summed: most of it is not in L2.
static void fetch_ahead(const Worker& w, const InstructionRow& i, const Block& block) {
  for (int64_t k = 0; k < i.count; ++k) {
    const EpilogueRow& step = w.job->epilogues[i.first + k];
    if (step.buffer < 0 || step.broadcast) continue;
    for_each_pixel(w, i, step, block,
                   [](const float*, const char* p) __attribute__((always_inline)) { __builtin_prefetch(p, 0, 3); });
  }
}
