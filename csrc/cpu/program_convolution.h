// Convolutions by multiply-adds: numbers of pixels are broadcast, a panel of outputs stays in registers.
// Part of program_variant.h, which compiles it once for each instruction set.
//
// A unit is some pixels that follow one another, across rows and images. Its addresses are found once for all panels. The sum of
// one number goes over the taps and, within each, over the channels, however pixels are grouped; a tap that is outside of the
// image reads zeros, or is left out where it is outside for the whole unit.
//
// Measured on one core of a Zen 5, whose peaks are 245 GFLOP/s in float32 and 490 in pairs of bfloat16: 4x4 with stride 2 and 3x3,
// 128 channels, epilogue included, 237 in float32 and 470 in bfloat16.
#pragma once

#include "program_epilogue.h"
#include "program_pairs.h"
#include "program_rows.h"
#include "program_team.h"

static FASTEBM_INLINE Vector multiply_add(float a, Vector b, Vector c) {
#if FASTEBM_VECTOR == 16
  return (Vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif FASTEBM_VECTOR == 8
  return (Vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// How the inputs of one tap are multiplied. `positions` pixels make a unit; `most` inputs are read at a time; a tap's weights for a
// panel begin at every `panel_bytes(channels)`; `add` adds inputs [0, count) to the sums of all positions.
struct FloatProduct {
  static constexpr int positions = kPositions;
  static constexpr int64_t most = 512;
  static int64_t panel_bytes(int64_t channels) { return channels * kPanel * 4; }

  template <int vectors>
  static FASTEBM_INLINE void add(Vector (&sum)[positions][vectors], const char* const* pixel, const char* weights, int64_t count) {
    for (int64_t c = 0; c < count; ++c) {
      Vector weight[vectors];
      for (int j = 0; j < vectors; ++j) weight[j] = reinterpret_cast<const Vector*>(weights + c * kPanel * 4)[j];
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j)
          sum[p][j] = multiply_add(reinterpret_cast<const float*>(pixel[p])[c], weight[j], sum[p][j]);
    }
  }
};

// Of bfloat16 inputs, which become float32 on their way into the registers.
#if FASTEBM_VECTOR == 8
struct WidenedProduct : FloatProduct {
  template <int vectors>
  static FASTEBM_INLINE void add(Vector (&sum)[positions][vectors], const char* const* pixel, const char* weights, int64_t count) {
    // A number is read with its left neighbour below it, which a mask removes: masks need none of the units of multiply-adds.
    const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
    const auto add_one = [&](int64_t c, auto number) __attribute__((always_inline)) {
      Vector weight[vectors];
      for (int j = 0; j < vectors; ++j) weight[j] = reinterpret_cast<const Vector*>(weights + c * kPanel * 4)[j];
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p) {
        const __m256 a = (__m256)number(p);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) sum[p][j] = (Vector)_mm256_fmadd_ps(a, (__m256)weight[j], (__m256)sum[p][j]);
      }
    };
    add_one(0, [&](int p) __attribute__((always_inline)) {
      return (__m256i)_mm256_set1_ps(widened(*reinterpret_cast<const uint16_t*>(pixel[p])));
    });
    for (int64_t c = 1; c < count; ++c)
      add_one(c, [&](int p) __attribute__((always_inline)) {
        int32_t pair;
        __builtin_memcpy(&pair, pixel[p] + c * 2 - 2, sizeof pair);
        return _mm256_and_si256(_mm256_set1_epi32(pair), upper);
      });
  }
};
#else
struct WidenedProduct : FloatProduct {
  static constexpr int64_t most = 256;  // 12 KB

  template <int vectors>
  static FASTEBM_INLINE void add(Vector (&sum)[positions][vectors], const char* const* pixel, const char* weights, int64_t count) {
    alignas(64) float wide[positions][most];
    const char* a[positions];
    for (int p = 0; p < positions; ++p) {
      const uint16_t* h = reinterpret_cast<const uint16_t*>(pixel[p]);
      for (int64_t k = 0; k < count; ++k) wide[p][k] = widened(h[k]);
      a[p] = reinterpret_cast<const char*>(wide[p]);
    }
    FloatProduct::add(sum, a, weights, count);
  }
};
#endif

#if FASTEBM_PAIRS
struct PairProduct {
  static constexpr int positions = 14;  // 28 sums, 2 weights and a pair of 32 registers
  static constexpr int64_t most = 1024;
  static int64_t panel_bytes(int64_t channels) { return (channels + 1) / 2 * kPanel * 4; }

  template <int vectors>
  static FASTEBM_INLINE void add(Vector (&sum)[positions][vectors], const char* const* pixel, const char* weights, int64_t count) {
    for (int64_t c = 0; c < count / 2; ++c) {
      Pairs weight[vectors];
      for (int j = 0; j < vectors; ++j) weight[j] = load_pairs(weights + c * kPanel * 4 + j * 64);
#pragma GCC unroll 16
      for (int p = 0; p < positions; ++p) {
        const Pairs a = broadcast_pair(pixel[p] + c * 4);
#pragma GCC unroll 8
        for (int j = 0; j < vectors; ++j) sum[p][j] = add_products(sum[p][j], a, weight[j]);
      }
    }
    if (count % 2 == 0) return;
    Pairs weight[vectors];
    for (int j = 0; j < vectors; ++j) weight[j] = load_pairs(weights + count / 2 * kPanel * 4 + j * 64);
#pragma GCC unroll 16
    for (int p = 0; p < positions; ++p) {
      const Pairs a = broadcast_one(pixel[p] + count / 2 * 4);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[p][j] = add_products(sum[p][j], a, weight[j]);
    }
  }
};
#endif

// Where the pixels of a unit read: the source's row and column of the first tap, and its address, which may be outside. There is
// room for whole vectors: what is behind the last pixel repeats it.
constexpr int kWindows = 16;

template <int positions>
struct Windows {
  alignas(64) int64_t top[kWindows], left[kWindows];
  alignas(64) const char* pixel[kWindows];

  // The addresses of one tap; false where it is outside of the image for all.
  FASTEBM_INLINE bool addresses(const InstructionRow& i, const BufferRow& source, int64_t ky, int64_t kx,
                                const char* (&found)[kWindows]) const {
    const int64_t down = ky * i.dilation_y, right = kx * i.dilation_x;
    const int64_t offset = (down * source.row_stride + right * source.pixel_stride) * source.bytes;
#if FASTEBM_VECTOR == 16
    const __m512i zeros = _mm512_set1_epi64(reinterpret_cast<int64_t>(kZeros));
    __mmask8 any = 0;
    for (int p = 0; p < positions; p += 8) {
      const __m512i y = _mm512_add_epi64(_mm512_load_si512(top + p), _mm512_set1_epi64(down)),
                    x = _mm512_add_epi64(_mm512_load_si512(left + p), _mm512_set1_epi64(right));
      const __mmask8 inside = _mm512_cmplt_epu64_mask(y, _mm512_set1_epi64(source.height)) &
                              _mm512_cmplt_epu64_mask(x, _mm512_set1_epi64(source.width));
      const __m512i moved = _mm512_add_epi64(_mm512_load_si512(pixel + p), _mm512_set1_epi64(offset));
      _mm512_store_si512(found + p, _mm512_mask_mov_epi64(zeros, inside, moved));
      any |= inside;
    }
    return any != 0;
#elif FASTEBM_VECTOR == 8
    const __m256i zeros = _mm256_set1_epi64x(reinterpret_cast<int64_t>(kZeros)), below = _mm256_set1_epi64x(-1);
    const __m256i height = _mm256_set1_epi64x(source.height), width = _mm256_set1_epi64x(source.width);
    __m256i any = _mm256_setzero_si256();
    for (int p = 0; p < positions; p += 4) {
      const auto at = [p](const auto* numbers) __attribute__((always_inline)) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers + p));
      };
      const __m256i y = _mm256_add_epi64(at(top), _mm256_set1_epi64x(down)), x = _mm256_add_epi64(at(left), _mm256_set1_epi64x(right));
      const __m256i inside = _mm256_and_si256(_mm256_and_si256(_mm256_cmpgt_epi64(y, below), _mm256_cmpgt_epi64(height, y)),
                                              _mm256_and_si256(_mm256_cmpgt_epi64(x, below), _mm256_cmpgt_epi64(width, x)));
      const __m256i moved = _mm256_add_epi64(at(pixel), _mm256_set1_epi64x(offset));
      _mm256_store_si256(reinterpret_cast<__m256i*>(found + p), _mm256_blendv_epi8(zeros, moved, inside));
      any = _mm256_or_si256(any, inside);
    }
    return !_mm256_testz_si256(any, any);
#else
    bool any = false;
    for (int p = 0; p < positions; ++p) {
      const uint64_t y = static_cast<uint64_t>(top[p] + down), x = static_cast<uint64_t>(left[p] + right);
      const bool inside = (y < static_cast<uint64_t>(source.height)) & (x < static_cast<uint64_t>(source.width));
      found[p] = inside ? pixel[p] + offset : reinterpret_cast<const char*>(kZeros);
      any |= inside;
    }
    return any;
#endif
  }
};

// A pixel of the grid, and the source's image.
struct Cursor {
  int64_t n, y, x;
  const char* image;
};

static FASTEBM_INLINE Cursor cursor_at(const Worker& w, const InstructionRow& i, const BufferRow& source, int64_t begin,
                                       int64_t first) {
  const int64_t plane = i.height * i.width, n = begin + first / plane;
  return {n, first % plane / i.width, first % i.width, pixel_of(w, source, n, 0, 0) + i.source_channel * source.bytes};
}

// A unit of the grid: its windows, and its pixels as the runs of a block. The cursor moves behind it.
template <int positions>
static FASTEBM_INLINE void unit_windows(const InstructionRow& i, const BufferRow& source, int count, Cursor& at, Block& block,
                                        Windows<positions>& found) {
  block.runs = 0;
  for (int p = 0; p < count; ++p) {
    if (p == 0 || at.x == 0) block.run[block.runs++] = {at.n, 0, at.y, at.x, 1, 0};
    ++block.run[block.runs - 1].count;
    found.top[p] = at.y * i.stride_y - i.pad_y;
    found.left[p] = at.x * i.stride_x - i.pad_x;
    found.pixel[p] = at.image + (found.top[p] * source.row_stride + found.left[p] * source.pixel_stride) * source.bytes;
    if (++at.x < i.width) continue;
    at.x = 0;
    if (++at.y < i.height) continue;
    at.y = 0;
    at.image += source.image_stride * source.bytes, ++at.n;
  }
  for (int p = count; p < kWindows; ++p)  // computed and not used
    found.top[p] = found.top[count - 1], found.left[p] = found.left[count - 1], found.pixel[p] = found.pixel[count - 1];
}

constexpr int64_t kTaps = 32;  // whose addresses are found once for all panels

template <class Product>
struct Unit {
  Windows<Product::positions> windows;
  bool inside[kTaps];
  alignas(64) const char* address[kTaps][kWindows];
};

// The sums of one panel for a unit, in rows of a block.
template <class Product, int vectors>
static FASTEBM_INLINE void sum_panel(const InstructionRow& i, const BufferRow& source, const Unit<Product>& unit,
                                     const char* weights, float* v) {
  constexpr int positions = Product::positions;
  Vector sum[positions][vectors] = {};
  const int64_t tap_bytes = Product::panel_bytes(i.source_channels);
  alignas(64) const char* moved[kWindows];
  for (int64_t ky = 0, t = 0; ky < i.kernel_y; ++ky)
    for (int64_t kx = 0; kx < i.kernel_x; ++kx, ++t) {
      const char* const* a = unit.address[t < kTaps ? t : 0];
      if (t < kTaps) {
        if (!unit.inside[t]) continue;
      } else {
        if (!unit.windows.addresses(i, source, ky, kx, moved)) continue;
        a = moved;
      }
      const char* b = weights + t * tap_bytes;
      Product::add(sum, a, b, least(Product::most, i.source_channels));
      for (int64_t c = Product::most; c < i.source_channels; c += Product::most) {
        const char* further[positions];
        for (int p = 0; p < positions; ++p)
          further[p] = a[p] == reinterpret_cast<const char*>(kZeros) ? a[p] : a[p] + c * source.bytes;
        Product::add(sum, further, b + Product::panel_bytes(c), least(Product::most, i.source_channels - c));
      }
    }
  for (int p = 0; p < positions; ++p) {
    for (int j = 0; j < vectors; ++j) reinterpret_cast<Vector*>(v + p * kBlock)[j] = sum[p][j];
    for (int c = vectors * FASTEBM_VECTOR; c < kPanel; ++c) v[p * kBlock + c] = 0;
  }
}

constexpr int64_t kTogether = kBlock / kPanel;  // panels in a block

static FASTEBM_INLINE void clear_panel(int positions, float* v) {
  for (int p = 0; p < positions; ++p)
    for (int c = 0; c < kPanel; ++c) v[p * kBlock + c] = 0;
}

template <class Product>
static void convolution_panels(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  constexpr int positions = Product::positions;
  const BufferRow& source = w.job->buffers[i.source];
  const char* weights = static_cast<const char*>(w.job->constants[i.constant].data);
  const int64_t pixels = (end - begin) * i.height * i.width, taps = i.kernel_y * i.kernel_x;
  const int64_t panels = (i.channels + kPanel - 1) / kPanel, panel_bytes = taps * Product::panel_bytes(i.source_channels);
  Range panel_range, unit_range;
  share_convolution(w, panels, (pixels + positions - 1) / positions, panel_range, unit_range);
  alignas(64) float v[positions * kBlock];
  Unit<Product> unit;
  Block block(v, 0, 0);
  Cursor at = cursor_at(w, i, source, begin, unit_range.begin * positions);
  for (int64_t u = unit_range.begin; u < unit_range.end; ++u) {
    unit_windows(i, source, static_cast<int>(least(positions, pixels - u * positions)), at, block, unit.windows);
    for (int64_t ky = 0, t = 0; ky < i.kernel_y; ++ky)
      for (int64_t kx = 0; kx < i.kernel_x && t < kTaps; ++kx, ++t)
        unit.inside[t] = unit.windows.addresses(i, source, ky, kx, unit.address[t]);
    for (int64_t panel = panel_range.begin; panel < panel_range.end; panel += kTogether) {
      const int64_t count = least(kTogether, panel_range.end - panel);
      block.channel = static_cast<int>(panel * kPanel);
      block.valid = static_cast<int>(least(count * kPanel, i.channels - block.channel));
      fetch_ahead(w, i, block);
      for (int64_t k = 0; k < kTogether; ++k) {
        const char* b = weights + (panel + k) * panel_bytes;
        const int64_t left = block.valid - k * kPanel;
        if (left > FASTEBM_VECTOR) sum_panel<Product, kVectors>(i, source, unit, b, v + k * kPanel);
        else if (left > 0) sum_panel<Product, 1>(i, source, unit, b, v + k * kPanel);
        else clear_panel(positions, v + k * kPanel);
      }
      epilogue(w, i, block);
    }
  }
}
