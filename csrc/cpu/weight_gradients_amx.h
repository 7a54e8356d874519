// Gradients of convolutions' weights on the matrix units of x86 (AMX), from bfloat16 buffers.
// Part of weight_gradients_variant.h, which compiles it once for each instruction set.
//
// A product's inner dimension is the pixels of an image's grid, row by row, 32 at a time. So each number is the sum that the other
// kernels make, in the same order, by fused multiply-adds; tiles flush subnormal numbers, and multiply pixels outside of the source
// by zeros instead of skipping them, which differs where the gradient is not finite. Both sides are copied: 16 outputs at a time
// as rows of pixels, and for each tap 16 inputs at a time as pairs of pixels.
#pragma once

#include "tiles.h"

constexpr int64_t kSteps = 16;  // products of 32 pixels whose copies are made together: 48 KB of outputs, 64 of inputs
constexpr int64_t kTileNumbers = 16 * 32;

static bool suits_tiles(const WeightJob& job, const WeightUnit& u) {
  const TaskRow& t = *u.task;
  return job.header->bytes == 2 && !u.exchanged && u.wides >= 8 && u.narrows >= 8 && t.height * t.width >= 8;
}

static UnitMemory tiles_memory(const WeightJob& job, const WeightUnit& u) {
  const Side wide = side_of(job, u, true);
  const int64_t tiles = (u.narrows + 15) / 16, pixels = u.task->height * u.task->width;
  const int64_t steps = least(kSteps, (pixels + 31) / 32), inputs = wide.pitch / 16;
  return {rounded_up(u.taps * u.narrows * wide.pitch), u.taps * tiles * 16 * wide.pitch, steps * tiles * kTileNumbers / 2,
          steps * inputs * kTileNumbers / 2, 0};
}

// The numbers of 16 channels of two pixels side by side, zeros where there is none.
static FASTEBM_INLINE __m512i pair_of(const char* first, const char* second, __mmask16 channels, bool broadcast) {
  const auto numbers = [&](const char* p) __attribute__((always_inline)) {
    if (p == nullptr) return _mm512_setzero_si512();
    if (broadcast) return _mm512_set1_epi32(*reinterpret_cast<const uint16_t*>(p));
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(channels, p));
  };
  return _mm512_or_si512(numbers(first), _mm512_slli_epi32(numbers(second), 16));
}

// Rows become columns in a square of 16 by 16 pairs.
static FASTEBM_INLINE void transpose_pairs(const __m512i (&rows)[16], char* out) {
  __m512i twos[16], fours[16];
  for (int i = 0; i < 8; ++i) {
    twos[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    twos[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      fours[4 * i + 2 * j] = _mm512_unpacklo_epi64(twos[4 * i + j], twos[4 * i + j + 2]);
      fours[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[4 * i + j], twos[4 * i + j + 2]);
    }
  // Lane l of fours[4 i + j] has rows 4 i to 4 i + 3 of column 4 l + j.
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88), odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i even_behind = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88),
                  odd_behind = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    _mm512_storeu_si512(out + 64 * j, _mm512_shuffle_i32x4(even, even_behind, 0x88));
    _mm512_storeu_si512(out + 64 * (4 + j), _mm512_shuffle_i32x4(odd, odd_behind, 0x88));
    _mm512_storeu_si512(out + 64 * (8 + j), _mm512_shuffle_i32x4(even, even_behind, 0xdd));
    _mm512_storeu_si512(out + 64 * (12 + j), _mm512_shuffle_i32x4(odd, odd_behind, 0xdd));
  }
}

// Where one side's numbers for pixel (y, x) of the grid lie at one tap, or null outside of the source.
struct TapView {
  const char* image;
  const BufferRow* buffer;
  int64_t stride_y, stride_x, down, right, height, width, factor_y, factor_x;

  FASTEBM_INLINE const char* at(int64_t y, int64_t x) const {
    const int64_t sy = y * stride_y + down, sx = x * stride_x + right;
    if (sy < 0 || sx < 0 || sy >= height || sx >= width) return nullptr;
    const int64_t row = factor_y == 1 ? sy : sy / factor_y, column = factor_x == 1 ? sx : sx / factor_x;
    return image + (row * buffer->row_stride + column * buffer->pixel_stride) * 2;
  }
};

static TapView view_of_tap(const WeightJob& job, const WeightUnit& u, const Side& side, bool gradient, int64_t n, int64_t tap) {
  const TaskRow& t = *u.task;
  const char* image = image_of(job, *side.buffer, n) + side.channel * 2;
  if (gradient) return {image, side.buffer, 1, 1, 0, 0, t.height, t.width, side.factor_y, side.factor_x};
  return {image,
          side.buffer,
          t.stride_y,
          t.stride_x,
          tap / t.kernel_x * t.dilation_y - t.pad_y,
          tap % t.kernel_x * t.dilation_x - t.pad_x,
          source_height(job, t),
          source_width(job, t),
          side.factor_y,
          side.factor_x};
}

// Copies 32 pixels from `first` on for each step, in tiles of 16 channels: (step, tile), as rows of pixels or as pairs.
template <bool rows_of_pixels>
static void copy_tiles(const TaskRow& t, const Side& side, const TapView& view, int64_t first, int64_t steps, char* out) {
  const int64_t pixels = t.height * t.width, tiles = (side.count + 15) / 16;
  int64_t y = first / t.width, x = first % t.width, k = first;
  for (int64_t step = 0; step < steps; ++step, out += tiles * kTileNumbers * 2) {
    const char* places[32];
    for (int i = 0; i < 32; ++i, ++k) {
      places[i] = k < pixels ? view.at(y, x) : nullptr;
      if (++x == t.width) x = 0, ++y;
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t count = least(16, side.count - 16 * tile), moved = side.broadcast ? 0 : 32 * tile;
      const auto channels = static_cast<__mmask16>((1u << count) - 1u);
      __m512i pairs[16];
      for (int r = 0; r < 16; ++r) {
        const char *a = places[2 * r], *b = places[2 * r + 1];
        pairs[r] = pair_of(a ? a + moved : a, b ? b + moved : b, channels, side.broadcast);
      }
      char* place = out + tile * kTileNumbers * 2;
      if (rows_of_pixels) transpose_pairs(pairs, place);
      else
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(place + 64 * r, pairs[r]);
    }
  }
}

// Sums of 16 or 32 outputs and as many inputs over some steps.
template <int M, int N>
static void multiply_pixels(const char* outputs, int64_t output_step, const char* inputs, int64_t input_step,
                                           int64_t steps, bool begins, float* sums, int64_t pitch) {
  asm volatile("" ::: "memory");  // the compiler does not see what a tile reads
  alignas(64) static const float zeros[16] = {};
  const float* from = begins ? zeros : sums;
  const int64_t stride = begins ? 0 : pitch * 4, right = begins ? 0 : 16, below = begins ? 0 : 16 * pitch;
  _tile_loadd(0, from, stride);
  if constexpr (N == 2) _tile_loadd(1, from + right, stride);
  if constexpr (M == 2) _tile_loadd(2, from + below, stride);
  if constexpr (M * N == 4) _tile_loadd(3, from + below + right, stride);
  for (int64_t step = 0; step < steps; ++step, outputs += output_step, inputs += input_step) {
    _tile_loadd(4, outputs, 64);
    _tile_loadd(6, inputs, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, inputs + kTileNumbers * 2, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M == 2) {
      _tile_loadd(5, outputs + kTileNumbers * 2, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M * N == 4) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, pitch * 4);
  if constexpr (N == 2) _tile_stored(1, sums + 16, pitch * 4);
  if constexpr (M == 2) _tile_stored(2, sums + 16 * pitch, pitch * 4);
  if constexpr (M * N == 4) _tile_stored(3, sums + 16 * pitch + 16, pitch * 4);
  asm volatile("" ::: "memory");
}

static void run_tiles(const WeightJob& job, const WeightUnit& u, float* memory) {
  const TaskRow& t = *u.task;
  const Side narrow = side_of(job, u, false), wide = side_of(job, u, true);
  const UnitMemory sizes = tiles_memory(job, u);
  float *own = memory, *partial = own + sizes.result;
  char *outputs = reinterpret_cast<char*>(partial + sizes.partial),
       *inputs = reinterpret_cast<char*>(partial + sizes.partial + sizes.narrow);
  const int64_t pitch = wide.pitch, out_tiles = (u.narrows + 15) / 16, in_tiles = pitch / 16, pixels = t.height * t.width;
  const int64_t output_step = out_tiles * kTileNumbers * 2, input_step = in_tiles * kTileNumbers * 2;
  move_result<true>(job, u, pitch, own);
  configure_tiles();
  for (int64_t n = 0; n < job.images; ++n) {
    for (int64_t first = 0; first < pixels; first += 32 * kSteps) {
      const int64_t steps = least(kSteps, (pixels - first + 31) / 32);
      copy_tiles<true>(t, narrow, view_of_tap(job, u, narrow, true, n, 0), first, steps, outputs);
      for (int64_t tap = 0; tap < u.taps; ++tap) {
        copy_tiles<false>(t, wide, view_of_tap(job, u, wide, false, n, u.tap + tap), first, steps, inputs);
        for (int64_t o = 0; o < out_tiles; o += 2)
          for (int64_t c = 0; c < in_tiles; c += 2) {
            float* sums = partial + ((tap * out_tiles + o) * pitch + c) * 16;
            const char *a = outputs + o * kTileNumbers * 2, *b = inputs + c * kTileNumbers * 2;
            const bool two = o + 1 < out_tiles, beside = c + 1 < in_tiles;
            const auto run = two ? (beside ? multiply_pixels<2, 2> : multiply_pixels<2, 1>)
                                 : (beside ? multiply_pixels<1, 2> : multiply_pixels<1, 1>);
            run(a, output_step, b, input_step, steps, first == 0, sums, pitch);
          }
      }
    }
    const Vector factor = splat(job.factors[n]);
    for (int64_t tap = 0; tap < u.taps; ++tap)
      for (int64_t b = 0; b < u.narrows; ++b) {
        const float* sums = partial + (tap * out_tiles * 16 + b) * pitch;
        float* result = own + (tap * u.narrows + b) * pitch;
        for (int64_t c = 0; c < pitch; c += kVector) store(result + c, multiply_add(factor, load(sums + c), load(result + c)));
      }
  }
  _tile_release();
  move_result<false>(job, u, pitch, own);
}
