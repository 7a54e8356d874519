// Convolutions of so few outputs that all their taps together are one panel of columns (tap, output).
// Part of program_variant.h, which compiles it once for each instruction set.
//
// The gradient of an image has 1 or 3 channels. A panel of 32 outputs would leave 29 of them unused, for each of 9 taps. Here
// every pixel of the source is multiplied once by all columns, and an output is the sum over its taps of products that lie in L2:
// 3 outputs of a 3x3 kernel take a ninth of the multiplications. The sum of one number goes over the channels, then over the taps.
#pragma once

#include "program_convolution.h"

#if FASTEBM_PAIRS && !FASTEBM_TILES
constexpr int64_t kTapPixels = 1024;  // of the source whose products are kept: 128 KB

// A part of one image's grid, and of the source that it reads.
struct TapTile {
  int64_t n, y, x, height, width;
  int64_t top, left, rows, columns;  // within the source; none where the whole tile reads zeros
};

struct TapPlan {
  int64_t height, width, down, across;  // of a tile, and how many
};

static TapPlan plan_taps(const Worker& w, const InstructionRow& i, const BufferRow& source) {
  const int64_t reach_y = (i.kernel_y - 1) * i.dilation_y, reach_x = (i.kernel_x - 1) * i.dilation_x;  // 15 at most
  TapPlan plan;
  plan.width = least(i.width, 64 - reach_x);
  const int64_t rows = kTapPixels / least(source.width, plan.width + reach_x);
  plan.height = least(source.height <= rows ? i.height : rows - reach_y, (i.height + w.parts - 1) / w.parts);
  plan.down = (i.height + plan.height - 1) / plan.height;
  plan.across = (i.width + plan.width - 1) / plan.width;
  return plan;
}

static TapTile tap_tile(const TapPlan& plan, const InstructionRow& i, const BufferRow& source, int64_t begin, int64_t number) {
  TapTile tile;
  tile.n = begin + number / (plan.down * plan.across);
  tile.y = number / plan.across % plan.down * plan.height;
  tile.x = number % plan.across * plan.width;
  tile.height = least(plan.height, i.height - tile.y);
  tile.width = least(plan.width, i.width - tile.x);
  tile.top = most(0, tile.y - i.pad_y);
  tile.left = most(0, tile.x - i.pad_x);
  tile.rows = most(0, least(source.height, tile.y - i.pad_y + tile.height + (i.kernel_y - 1) * i.dilation_y) - tile.top);
  tile.columns = most(0, least(source.width, tile.x - i.pad_x + tile.width + (i.kernel_x - 1) * i.dilation_x) - tile.left);
  return tile;
}

// The products of a tile's source with all columns, 32 floats for a pixel.
template <int vectors>
static void multiply_source(const Worker& w, const InstructionRow& i, const BufferRow& source, const TapTile& tile,
                            float* products) {
  constexpr int positions = PairProduct::positions;
  const char* weights = static_cast<const char*>(w.job->constants[i.constant].data);
  const int64_t pixels = tile.rows * tile.columns;
  const char* row = pixel_of(w, source, tile.n, tile.top, tile.left) + i.source_channel * source.bytes;
  int64_t x = 0;
  for (int64_t first = 0; first < pixels; first += positions) {
    const int count = static_cast<int>(least(positions, pixels - first));
    const char* address[positions];
    for (int p = 0; p < positions; ++p) {
      address[p] = p < count ? row + x * source.pixel_stride * source.bytes : address[count - 1];
      if (p < count && ++x == tile.columns) x = 0, row += source.row_stride * source.bytes;
    }
    Vector sum[positions][vectors] = {};
    PairProduct::add(sum, address, weights, i.source_channels);
    for (int p = 0; p < positions; ++p)
      if (p < count)
        for (int j = 0; j < vectors; ++j) reinterpret_cast<Vector*>(products + (first + p) * kBlock)[j] = sum[p][j];
  }
}

// The sums over the taps for some pixels of a row.
static FASTEBM_INLINE void add_taps(const InstructionRow& i, const TapTile& tile, const float* products, int64_t y, int64_t x,
                                    int count, float* v) {
  const __mmask16 outputs = static_cast<__mmask16>((1u << i.channels) - 1);
  for (int k = 0; k < count * kBlock; ++k) v[k] = 0;
  for (int64_t ky = 0, t = 0; ky < i.kernel_y; ++ky)
    for (int64_t kx = 0; kx < i.kernel_x; ++kx, ++t) {
      const int64_t row = y - i.pad_y + ky * i.dilation_y - tile.top, column = x - i.pad_x + kx * i.dilation_x - tile.left;
      if (row < 0 || row >= tile.rows) continue;
      const float* p = products + (row * tile.columns + column) * kBlock + t * i.channels;
      for (int64_t k = most(0, -column); k < least(count, tile.columns - column); ++k) {
        const __m512 product = _mm512_maskz_loadu_ps(outputs, p + k * kBlock);
        _mm512_store_ps(v + k * kBlock, _mm512_add_ps(_mm512_load_ps(v + k * kBlock), product));
      }
    }
}

static void convolution_taps(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  const BufferRow& source = w.job->buffers[i.source];
  const TapPlan plan = plan_taps(w, i, source);
  const Range tiles = share((end - begin) * plan.down * plan.across, w.part, w.parts);
  alignas(64) float v[kBlock * kBlock];
  alignas(64) float products[kTapPixels * kBlock];
  for (int64_t number = tiles.begin; number < tiles.end; ++number) {
    const TapTile tile = tap_tile(plan, i, source, begin, number);
    if (i.channels * i.kernel_y * i.kernel_x > FASTEBM_VECTOR) multiply_source<2>(w, i, source, tile, products);
    else multiply_source<1>(w, i, source, tile, products);
    for (int64_t y = tile.y; y < tile.y + tile.height; ++y)
      for (int64_t x = tile.x; x < tile.x + tile.width; x += kBlock) {
        const int count = static_cast<int>(least(kBlock, tile.x + tile.width - x));
        Block block(v, 0, static_cast<int>(i.channels));
        block.run[block.runs++] = {tile.n, 0, y, x, 1, count};
        fetch_ahead(w, i, block);
        add_taps(i, tile, products, y, x, count, v);
        epilogue(w, i, block);
      }
  }
}
#endif
