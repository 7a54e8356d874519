// Convolutions of bfloat16 on the matrix units of x86 (AMX).
// Part of program_variant.h, which compiles it once for each instruction set.
//
// Whatever is multiplied was written by the same call, also where weights are zero: 0 * NaN is NaN. Beside rows lie zeros
// (fastebm/ops/tiles.py says how many); behind the last of a pixel's inputs lies anything, which a mask keeps out.
//
// A tile is 16 rows of 32 inputs. Its rows are 16 pixels that lie at equal distances: 16 neighbours of one row of the image,
// whatever the stride, or, on small maps, the same pixel of 16 images. 2x2 tiles of accumulators make a block of 32 pixels and 32
// outputs out of four loads for four products. A tap outside of the image reads a line of zeros, or is left out where it is
// outside for both tiles; so the sums of one number are in one order, however images and pixels are grouped.
//
// Measured on one core of a 3.8 TFLOP/s machine: 2.4 TFLOP/s for 3x3 and 2.3 for 4x4 with stride 2, 128 channels.
#pragma once

#include "program_epilogue.h"
#include "program_team.h"
#include "tiles.h"

// What one tile of inputs is at.
struct TileUnit {
  int64_t n, y, x;  // of its first row, in the grid
  int count;        // rows that are wanted
};

struct TilePlan {
  bool over_images;  // rows are images, else pixels of a row
  int64_t begin, end, groups, units;
  int64_t pixels;  // neighbours that share a tile over images, where a chunk has fewer than 16
};

static TilePlan plan_tiles(const InstructionRow& i, const BufferRow& source, int64_t begin, int64_t end) {
  const int64_t images = end - begin, across = (i.width + 15) / 16, deep = (images + 15) / 16;
  // Images that lie pixel by pixel beside each other: 16 rows at one distance are all images of several neighbours.
  const bool beside = source.pixel_stride == images * source.image_stride && images < 16 && 16 % images == 0 && i.stride_x == 1 &&
                      source.pixel_stride != kDense;
  const int64_t pixels = beside ? 16 / images : 1, steps = (i.width + pixels - 1) / pixels;
  // The share of tile rows that is wanted: width / (16 across), against images / (16 deep) or width / (steps pixels). Wide maps
  // never read beyond the images of a short chunk, for which the workspace would need room.
  const bool over_images = source.width < 32 && (beside || images * across > i.width * deep);
  if (!over_images) return {false, begin, end, across, across * i.height * images, 1};
  return {true, begin, end, deep, deep * i.height * steps, pixels};
}

static FASTEBM_INLINE TileUnit unit_at(const TilePlan& plan, const InstructionRow& i, int64_t unit) {
  const int64_t group = unit % plan.groups, rest = unit / plan.groups;
  if (plan.over_images) {
    const int64_t n = plan.begin + 16 * group, steps = (i.width + plan.pixels - 1) / plan.pixels, x = rest % steps * plan.pixels;
    const int64_t images = least(16, plan.end - n);
    return {n, rest / steps, x, static_cast<int>(plan.pixels == 1 ? images : images * least(plan.pixels, i.width - x))};
  }
  return {plan.begin + rest / i.height, rest % i.height, 16 * group, static_cast<int>(least(16, i.width - 16 * group))};
}

struct TileSource {
  const char* data;  // where the window's first pixel is, or would be
  int64_t stride, first_y, first_x;
  bool one_pixel;  // all rows are beside the image where one is; else zeros lie there
};

static FASTEBM_INLINE TileSource source_at(const Worker& w, const TilePlan& plan, const InstructionRow& i, const BufferRow& b,
                                           const TileUnit& u) {
  const int64_t y = u.y * i.stride_y - i.pad_y, x = u.x * i.stride_x - i.pad_x;
  const char* data = pixel_of(w, b, u.n, 0, 0) + (y * b.row_stride + x * b.pixel_stride + i.source_channel) * 2;
  return {data, (plan.over_images ? b.image_stride : i.stride_x * b.pixel_stride) * 2, y, x,
          plan.over_images && plan.pixels == 1};
}

// How many steps of 32 inputs keep a panel's weights in L1, if there are more than fit at once: whole rows of taps.
static FASTEBM_INLINE int64_t taps_at_a_time(int64_t tiles, int64_t taps, int64_t row, int64_t inputs) {
  if (taps * inputs * tiles <= 32) return taps;
  return row * inputs * tiles <= 32 ? row * most(1, 32 / (row * inputs * tiles)) : most(1, 24 / (tiles * inputs));
}

// The last inputs of 16 pixels that don't have 32 more.
static FASTEBM_INLINE void copy_inputs(char* tile, const char* pixels, int64_t stride, __mmask32 inputs) {
  for (int row = 0; row < 16; ++row)
    _mm512_store_si512(tile + 64 * row, _mm512_maskz_loadu_epi16(inputs, pixels + row * stride));
}

// One block of M x N tiles over taps [first, last): accumulators come from `sums`, at first from the bias, and go to `sums`.
template <int M, int N>
static FASTEBM_INLINE void multiply_tiles(const InstructionRow& i, const BufferRow& b, const TileSource* s, const char* weights,
                                          int64_t inputs, bool dense, int64_t first, int64_t last, const float* bias,
                                          float* sums) {
  alignas(64) static const char zeros[64] = {};
  asm volatile("" ::: "memory");  // the compiler does not see what a tile reads
  // Tiles 0 to 3 accumulate (pixels 0: 0, 1; pixels 1: 2, 3; or pixels 0 to 3 of one panel of 16), 4 and 5 hold pixels, 6 and 7
  // weights.
  if (first == 0) {
    // A stride of 0: every pixel begins with the bias.
    _tile_loadd(0, bias, 0);
    if constexpr (N == 2) _tile_loadd(1, bias + 16, 0);
    if constexpr (M == 2) {
      _tile_loadd(2, bias, 0);
      _tile_loadd(3, bias + 16, 0);
    }
    if constexpr (M == 4) {
      _tile_loadd(1, bias, 0);
      _tile_loadd(2, bias, 0);
      _tile_loadd(3, bias, 0);
    }
  } else {
    _tile_loadd(0, sums, 128);
    if constexpr (N == 2) _tile_loadd(1, sums + 16, 128);
    if constexpr (M * N == 4 && N == 2) {
      _tile_loadd(2, sums + 512, 128);
      _tile_loadd(3, sums + 528, 128);
    }
    if constexpr (M == 4) {
      _tile_loadd(1, sums + 512, 128);
      _tile_loadd(2, sums + 1024, 128);
      _tile_loadd(3, sums + 1536, 128);
    }
  }
  const int64_t kernel_x = dense ? 1 : i.kernel_x, rest = dense ? 0 : i.source_channels % 32;
  const __mmask32 last_inputs = (1u << rest) - 1;
  alignas(64) char part[M][1024];
  int64_t row = first / kernel_x, column = first % kernel_x;
  for (int64_t t = first; t < last; ++t, ++column) {
    if (column == kernel_x) {
      column = 0;
      ++row;
    }
    const int64_t ky = row * i.dilation_y, kx = column * i.dilation_x;
    const char* a[M];
    int64_t stride[M], step[M];
    bool any = false;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const int64_t y = s[m].first_y + ky, x = s[m].first_x + kx;
      const bool inside = y >= 0 && y < b.height && (dense || !s[m].one_pixel || (x >= 0 && x < b.width));
      a[m] = inside ? s[m].data + (ky * b.row_stride + kx * b.pixel_stride) * 2 : zeros;
      stride[m] = inside ? s[m].stride : 0;
      step[m] = inside ? 64 : 0;
      any |= inside;
    }
    if (!any) continue;
    const char* k = weights + t * inputs * N * 1024;
    for (int64_t c = 0; c < inputs; ++c) {
      if (rest != 0 && c == inputs - 1) {
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          copy_inputs(part[m], a[m], stride[m], last_inputs);
          a[m] = part[m];
          stride[m] = 64;
        }
        asm volatile("" ::: "memory");
      }
      if constexpr (N == 2) {
        _tile_loadd(4, a[0], stride[0]);
        _tile_loadd(6, k, 64);
        _tile_loadd(7, k + 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (M == 2) {
          _tile_loadd(5, a[1], stride[1]);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        _tile_loadd(6, k, 64);
        _tile_loadd(4, a[0], stride[0]);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (M == 4) {
          _tile_loadd(5, a[1], stride[1]);
          _tile_dpbf16ps(1, 5, 6);
          _tile_loadd(4, a[2], stride[2]);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(5, a[3], stride[3]);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) a[m] += step[m];
      k += N * 1024;
    }
  }
  _tile_stored(0, sums, 128);
  if constexpr (N == 2) _tile_stored(1, sums + 16, 128);
  if constexpr (M * N == 4 && N == 2) {
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
  }
  if constexpr (M == 4) {
    _tile_stored(1, sums + 512, 128);
    _tile_stored(2, sums + 1024, 128);
    _tile_stored(3, sums + 1536, 128);
  }
}

// The block of pixels that one or two units are.
static FASTEBM_INLINE Block block_of(const TilePlan& plan, const InstructionRow& i, const TileUnit* units, int count, float* sums,
                                     int64_t channel, int64_t width) {
  Block block(sums, static_cast<int>(channel), static_cast<int>(least(width, i.channels - channel)));
  for (int k = 0; k < count; ++k) {
    const TileUnit& unit = units[k];
    if (!plan.over_images) {
      block.run[block.runs++] = {unit.n, 0, unit.y, unit.x, 1, unit.count};
      continue;
    }
    const int images = static_cast<int>(unit.count / most(1, least(plan.pixels, i.width - unit.x)));
    for (int64_t x = unit.x, left = unit.count; left > 0; ++x, left -= images)
      block.run[block.runs++] = {unit.n, 1, unit.y, x, 0, images};
  }
  return block;
}

static void finish_tiles(const Worker& w, const TilePlan& plan, const InstructionRow& i, const TileUnit* units, int count,
                         float* sums, int64_t channel, int64_t width) {
  if (width == 16)  // the other half of each row is not computed, but may be stored as filling
    for (int p = 0; p < count * 16; ++p)
      for (int c = 16; c < 32; ++c) sums[p * 32 + c] = 0;
  // An epilogue works on at most 32 pixels.
  for (int u = 0; u < count; u += 2) {
    float* v = sums + u * 512;
    const int pair = static_cast<int>(least(2, count - u));
    if (pair == 2 && units[u].count < 16) {
      // Rows of a block follow one another: a tile that is not full ends its block.
      epilogue(w, i, block_of(plan, i, units + u, 1, v, channel, width));
      epilogue(w, i, block_of(plan, i, units + u + 1, 1, v + 512, channel, width));
      continue;
    }
    epilogue(w, i, block_of(plan, i, units + u, pair, v, channel, width));
  }
}

template <int M, int N>
static void convolve_tiles(const Worker& w, const InstructionRow& instruction, const TilePlan& plan, Range panels, Range units) {
  InstructionRow i = instruction;
  const float* biases = nullptr;
  if (i.count > 0 && w.job->epilogues[i.first].op == EpilogueOp::add_constant) {
    const ConstantView& k = w.job->constants[w.job->epilogues[i.first].number];
    if (k.height * k.width == 1) {
      biases = static_cast<const float*>(k.data);
      ++i.first;
      --i.count;
    }
  }
  const BufferRow& source = w.job->buffers[i.source];
  const char* weights = static_cast<const char*>(w.job->constants[i.constant].data);
  const bool dense = source.pixel_stride == kDense;
  const int64_t taps = dense ? i.kernel_y : i.kernel_y * i.kernel_x, inputs = dense ? 1 : (i.source_channels + 31) / 32;
  const int64_t at_a_time = taps_at_a_time(N, taps, dense ? 1 : i.kernel_x, inputs);
  constexpr int kGroup = 64 / M;  // blocks whose sums stay in L2 (128 KB) while the weights change
  alignas(64) float sums[64 * 512];
  TileUnit unit[64];
  TileSource at[64];
  for (int64_t first = units.begin; first < units.end; first += kGroup * M) {
    const int count = static_cast<int>(least(kGroup * M, units.end - first));
    for (int u = 0; u < count; ++u) {
      unit[u] = unit_at(plan, i, first + u);
      at[u] = source_at(w, plan, i, source, unit[u]);
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const char* b = weights + panel * taps * inputs * N * 1024;
      const float* bias = biases ? biases + panel * 16 * N : kZeros;
      for (int64_t t = 0; t < taps; t += at_a_time) {
        const int64_t last = least(taps, t + at_a_time);
        int u = 0;
        for (; u + M <= count; u += M) {
          if (last == taps) fetch_ahead(w, i, block_of(plan, i, unit + u, M, sums + u * 512, panel * 16 * N, 16 * N));
          multiply_tiles<M, N>(i, source, at + u, b, inputs, dense, t, last, bias, sums + u * 512);
          if (last == taps) finish_tiles(w, plan, i, unit + u, M, sums + u * 512, panel * 16 * N, 16 * N);
        }
        for (; u < count; ++u) {
          multiply_tiles<1, N>(i, source, at + u, b, inputs, dense, t, last, bias, sums + u * 512);
          if (last == taps) finish_tiles(w, plan, i, unit + u, 1, sums + u * 512, panel * 16 * N, 16 * N);
        }
      }
    }
  }
}

static void convolution_tiles(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  configure_tiles();
  const TilePlan plan = plan_tiles(i, w.job->buffers[i.source], begin, end);
  const int64_t width = i.channels <= 16 ? 16 : 32, panels = (i.channels + width - 1) / width;
  Range panel, unit;
  share_convolution(w, panels, plan.units, panel, unit);
  if (width == 16) convolve_tiles<4, 1>(w, i, plan, panel, unit);
  else convolve_tiles<2, 2>(w, i, plan, panel, unit);
  _tile_release();
}
