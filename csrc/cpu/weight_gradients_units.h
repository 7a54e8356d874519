// One unit of a task: a part of its result, from all images in order.
// Part of weight_gradients_variant.h, which compiles it once for each instruction set.
//
// A tile of the result stays in registers while the pixels of an image, or of some rows of it, go by: each is a few numbers of the
// narrow side times a few vectors of the wide one. The rows that are multiplied for all taps and tiles stay in L1.
#pragma once

#include "weight_gradients_sides.h"

#if FASTEBM_VECTOR == 16
constexpr int kWideVectors = 4, kAccumulators = 24;  // of 32 registers
#elif FASTEBM_VECTOR == 8
constexpr int kWideVectors = 2, kAccumulators = 12;  // of 16
#else
constexpr int kWideVectors = 2, kAccumulators = 4;
#endif
constexpr int kMostNarrow = 12;
constexpr int64_t kWidest = kWideVectors * kVector;
constexpr int64_t kCopyBytes = 256 << 10;  // of the wide side's rows: in L2
constexpr int64_t kBlockBytes = 40 << 10;  // of those that are multiplied together: in L1
constexpr int64_t kTogether = 32;          // images of one pixel that are copied together

// Numbers of the narrow side in a tile of so many vectors.
static constexpr int narrow_of(int vectors) {
  return kAccumulators / vectors < kMostNarrow ? kAccumulators / vectors : kMostNarrow;
}

// ---- tiles

// Where the pixels of a tile lie: in rows and columns of tables of offsets.
struct Pixels {
  const float *narrow, *wide;
  const int64_t *narrow_rows, *wide_rows, *narrow_columns, *wide_columns;
  Range rows, columns;
};

struct Tile {
  float* partial;  // sums of one image, or null where they begin and end with these pixels
  bool begins, ends;
  float* result;
  int64_t pitch;  // of both, from one number of the narrow side to the next
  float factor;
};

template <int kNarrow, int kWide>
static void add_pixels(const Pixels& p, const Tile& tile) {
  Vector sum[kNarrow][kWide];
#pragma GCC unroll 16
  for (int b = 0; b < kNarrow; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[b][j] = tile.begins ? Vector{} : load(tile.partial + b * tile.pitch + j * kVector);
  for (int64_t y = p.rows.begin; y < p.rows.end; ++y) {
    const float *narrow = p.narrow + p.narrow_rows[y], *wide = p.wide + p.wide_rows[y];
    for (int64_t x = p.columns.begin; x < p.columns.end; ++x) {
      const float *s = narrow + p.narrow_columns[x], *v = wide + p.wide_columns[x];
      Vector w[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) w[j] = load(v + j * kVector);
#pragma GCC unroll 16
      for (int b = 0; b < kNarrow; ++b) {
        const Vector a = splat(s[b]);
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) sum[b][j] = multiply_add(a, w[j], sum[b][j]);
      }
    }
  }
  const Vector factor = splat(tile.factor);
#pragma GCC unroll 16
  for (int b = 0; b < kNarrow; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      const int64_t at = b * tile.pitch + j * kVector;
      if (tile.ends) store(tile.result + at, multiply_add(factor, sum[b][j], load(tile.result + at)));
      else store(tile.partial + at, sum[b][j]);
    }
}

// Images of one pixel: the sum over pixels is one product, and results stay in registers.
template <int kNarrow, int kWide>
static void add_images(const float* narrow, int64_t narrow_pitch, const float* wide, int64_t wide_pitch, const float* factors,
                       int64_t images, float* result, int64_t pitch) {
  Vector sum[kNarrow][kWide];
#pragma GCC unroll 16
  for (int b = 0; b < kNarrow; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[b][j] = load(result + b * pitch + j * kVector);
  for (int64_t n = 0; n < images; ++n, narrow += narrow_pitch, wide += wide_pitch) {
    const Vector factor = splat(factors[n]);
    Vector w[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) w[j] = load(wide + j * kVector);
#pragma GCC unroll 16
    for (int b = 0; b < kNarrow; ++b) {
      const Vector a = splat(narrow[b]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[b][j] = multiply_add(factor, multiply_add(a, w[j], Vector{}), sum[b][j]);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < kNarrow; ++b)
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) store(result + b * pitch + j * kVector, sum[b][j]);
}

using AddPixels = void (*)(const Pixels&, const Tile&);
using AddImages = void (*)(const float*, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t);

struct TileKernels {
  AddPixels pixels;
  AddImages images;
};

template <int kNarrow, int kWide>
static FASTEBM_INLINE TileKernels kernels_for() {
  if constexpr (kWide <= kWideVectors && kNarrow <= narrow_of(kWide)) return {add_pixels<kNarrow, kWide>, add_images<kNarrow, kWide>};
  else return {nullptr, nullptr};
}
template <int kWide>
static TileKernels kernels_of_width(int64_t narrow) {
  switch (narrow) {
    case 1: return kernels_for<1, kWide>();
    case 2: return kernels_for<2, kWide>();
    case 3: return kernels_for<3, kWide>();
    case 4: return kernels_for<4, kWide>();
    case 5: return kernels_for<5, kWide>();
    case 6: return kernels_for<6, kWide>();
    case 7: return kernels_for<7, kWide>();
    case 8: return kernels_for<8, kWide>();
    case 9: return kernels_for<9, kWide>();
    case 10: return kernels_for<10, kWide>();
    case 11: return kernels_for<11, kWide>();
    default: return kernels_for<12, kWide>();
  }
}
static TileKernels tile_kernels(int64_t narrow, int64_t wide) {
  switch (wide) {
    case 1: return kernels_of_width<1>(narrow);
    case 2: return kernels_of_width<2>(narrow);
    case 3: return kernels_of_width<3>(narrow);
    default: return kernels_of_width<4>(narrow);
  }
}

// The narrow side in tiles of nearly equal size: the least, or one more.
struct Tiles {
  int64_t count, total;
  TileKernels smaller, larger;
  Tiles(int64_t narrows, int64_t vectors) : count((narrows + narrow_of(vectors) - 1) / narrow_of(vectors)), total(narrows) {
    smaller = tile_kernels(total / count, vectors);
    larger = tile_kernels(total / count + (total % count != 0), vectors);
  }
  int64_t begin(int64_t tile) const { return total * tile / count; }
  const TileKernels& kernels(int64_t tile) const { return begin(tile + 1) - begin(tile) == total / count ? smaller : larger; }
};

// ---- the result of a unit, kept in memory of its own: (tap, narrow, wide) with whole vectors

template <bool loads>
static void move_result(const WeightJob& job, const WeightUnit& u, int64_t pitch, float* own) {
  const TaskRow& t = *u.task;
  float* result = job.results[t.result];
  for (int64_t tap = 0; tap < u.taps; ++tap)
    for (int64_t b = 0; b < u.narrows; ++b, own += pitch) {
      const int64_t base = (u.tap + tap) * t.out * t.inner;
      if (!u.exchanged) {
        float* p = result + base + (u.narrow + b) * t.inner + u.wide;
        for (int64_t c = 0; c < u.wides; c += kVector)
          if (loads) store(own + c, load_some(reinterpret_cast<const char*>(p + c), 4, u.wides - c));
          else store_some(p + c, load(own + c), u.wides - c);
      } else {
        float* p = result + base + u.wide * t.inner + u.narrow + b;
        for (int64_t c = 0; c < (loads ? pitch : u.wides); ++c)
          if (loads) own[c] = c < u.wides ? p[c * t.inner] : 0.0f;
          else p[c * t.inner] = own[c];
      }
    }
}

// ---- convolutions over images of more than one pixel

// How a unit takes the rows of the grid: `strip` of them are copied at a time, `block` of these go through all taps and tiles.
struct Rows {
  int64_t strip, block;
};

// Stored rows of the wide or narrow side under rows [begin, end) of the grid and all taps of the unit.
static Range rows_under(const WeightJob& job, const WeightUnit& u, bool gradient, int64_t begin, int64_t end) {
  const TaskRow& t = *u.task;
  if (gradient) return {begin / t.gradient_factor_y, (end - 1) / t.gradient_factor_y + 1};
  const int64_t first = u.tap / t.kernel_x, last = (u.tap + u.taps - 1) / t.kernel_x;
  const int64_t top = most(0, begin * t.stride_y - t.pad_y + first * t.dilation_y);
  const int64_t bottom = least(source_height(job, t), (end - 1) * t.stride_y - t.pad_y + last * t.dilation_y + 1);
  if (bottom <= top) return {0, 0};
  return {top / t.source_factor_y, (bottom - 1) / t.source_factor_y + 1};
}

static Rows rows_of(const WeightJob& job, const WeightUnit& u, const Side& wide) {
  const TaskRow& t = *u.task;
  const int64_t row = t.width * wide.pitch * 4;
  Rows rows{most(1, kCopyBytes / row), most(1, kBlockBytes / row)};
  if (wide.direct) rows.strip = t.height;
  rows.strip = least(rows.strip, t.height);
  // Blocks of nearly equal size; one where an image is hardly more.
  if (t.height * row <= 3 * kBlockBytes / 2) rows.block = t.height;
  const int64_t blocks = (t.height + rows.block - 1) / rows.block;
  rows.block = (t.height + blocks - 1) / blocks;
  rows.strip = most(1, rows.strip / rows.block) * rows.block;
  return rows;
}

// Offsets of rows and columns for both sides: those of the gradient, and those of the source for each row and column of taps.
struct Tables {
  int64_t *gradient_rows, *gradient_columns, *source_rows, *source_columns;
};

static int64_t table_numbers(const TaskRow& t) { return (1 + t.kernel_y) * t.height + (1 + t.kernel_x) * t.width; }

static Tables tables_of(const WeightJob& job, const TaskRow& t, const Side& gradient, const Side& source, int64_t* memory) {
  Tables tables{memory, memory + t.height, memory + t.height + t.width, memory + t.height + t.width + t.kernel_y * t.height};
  for (int64_t y = 0; y < t.height; ++y) tables.gradient_rows[y] = y / t.gradient_factor_y * gradient.row();
  for (int64_t x = 0; x < t.width; ++x) tables.gradient_columns[x] = x / t.gradient_factor_x * gradient.pixel();
  for (int64_t k = 0; k < t.kernel_y; ++k) {
    const int64_t shift = k * t.dilation_y - t.pad_y;
    const Range rows = inside(t.height, t.stride_y, shift, source_height(job, t));
    for (int64_t y = rows.begin; y < rows.end; ++y)
      tables.source_rows[k * t.height + y] = (y * t.stride_y + shift) / t.source_factor_y * source.row();
  }
  for (int64_t k = 0; k < t.kernel_x; ++k) {
    const int64_t shift = k * t.dilation_x - t.pad_x;
    const Range columns = inside(t.width, t.stride_x, shift, source_width(job, t));
    for (int64_t x = columns.begin; x < columns.end; ++x)
      tables.source_columns[k * t.width + x] = (x * t.stride_x + shift) / t.source_factor_x * source.pixel();
  }
  return tables;
}

// Where one side's numbers are now: in the buffer, or in a copy that begins with some row.
static const float* place_rows(const WeightJob& job, const WeightUnit& u, const Side& side, bool gradient, int64_t n,
                               int64_t begin, int64_t end, float* copy) {
  const char* image = image_of(job, *side.buffer, n);
  if (side.direct) return reinterpret_cast<const float*>(image) + side.channel;
  const Range rows = rows_under(job, u, gradient, begin, end);
  copy_rows(side, image, rows.begin, rows.end, copy);
  return copy - rows.begin * side.row();
}

struct UnitMemory {
  int64_t result, partial, narrow, wide, tables;  // floats of each
};

static int64_t rounded_up(int64_t floats) { return (floats + 15) / 16 * 16; }

static int64_t most_rows_under(const WeightJob& job, const WeightUnit& u, bool gradient, int64_t strip) {
  int64_t largest = 0;
  for (int64_t y = 0; y < u.task->height; y += strip) {
    const Range rows = rows_under(job, u, gradient, y, least(u.task->height, y + strip));
    largest = most(largest, rows.end - rows.begin);
  }
  return largest;
}

#if FASTEBM_TILES
#include "weight_gradients_amx.h"
#endif

static UnitMemory convolution_memory(const WeightJob& job, const WeightUnit& u) {
  const TaskRow& t = *u.task;
#if FASTEBM_TILES
  if (suits_tiles(job, u)) return tiles_memory(job, u);
#endif
  const Side narrow = side_of(job, u, false), wide = side_of(job, u, true);
  const int64_t numbers = rounded_up(u.taps * u.narrows * wide.pitch);
  if (t.height * t.width == 1) return {numbers, 0, rounded_up(kTogether * narrow.pitch), rounded_up(kTogether * wide.pitch), 0};
  const Rows rows = rows_of(job, u, wide);
  UnitMemory memory{numbers, rows.block < t.height ? numbers : 0, 0, 0, rounded_up(2 * table_numbers(t))};
  if (!narrow.direct) memory.narrow = rounded_up(most_rows_under(job, u, u.exchanged == false, rows.strip) * narrow.row());
  if (!wide.direct) memory.wide = rounded_up(most_rows_under(job, u, u.exchanged, rows.strip) * wide.row());
  return memory;
}

static void run_convolution(const WeightJob& job, const WeightUnit& u, float* memory) {
  const TaskRow& t = *u.task;
  const Side narrow = side_of(job, u, false), wide = side_of(job, u, true);
  const UnitMemory sizes = convolution_memory(job, u);
  const Rows rows = rows_of(job, u, wide);
  float *own = memory, *partial = own + sizes.result, *narrow_copy = partial + sizes.partial,
        *wide_copy = narrow_copy + sizes.narrow;
  const Tables tables = tables_of(job, t, u.exchanged ? wide : narrow, u.exchanged ? narrow : wide,
                                  reinterpret_cast<int64_t*>(wide_copy + sizes.wide));
  const int64_t pitch = wide.pitch, vectors = pitch / kVector;
  const Tiles tiles(u.narrows, vectors);
  move_result<true>(job, u, pitch, own);
  for (int64_t n = 0; n < job.images; ++n) {
    for (int64_t strip = 0; strip < t.height; strip += rows.strip) {
      const int64_t strip_end = least(t.height, strip + rows.strip);
      Pixels pixels{};
      pixels.narrow = place_rows(job, u, narrow, !u.exchanged, n, strip, strip_end, narrow_copy);
      pixels.wide = place_rows(job, u, wide, u.exchanged, n, strip, strip_end, wide_copy);
      for (int64_t block = strip; block < strip_end; block += rows.block) {
        const int64_t block_end = least(strip_end, block + rows.block);
        for (int64_t tap = 0; tap < u.taps; ++tap) {
          const int64_t ky = (u.tap + tap) / t.kernel_x, kx = (u.tap + tap) % t.kernel_x;
          const Range there = inside(t.height, t.stride_y, ky * t.dilation_y - t.pad_y, source_height(job, t));
          pixels.rows = {most(block, there.begin), least(block_end, there.end)};
          pixels.columns = inside(t.width, t.stride_x, kx * t.dilation_x - t.pad_x, source_width(job, t));
          const int64_t *source_rows = tables.source_rows + ky * t.height, *source_columns = tables.source_columns + kx * t.width;
          pixels.narrow_rows = u.exchanged ? source_rows : tables.gradient_rows;
          pixels.narrow_columns = u.exchanged ? source_columns : tables.gradient_columns;
          pixels.wide_rows = u.exchanged ? tables.gradient_rows : source_rows;
          pixels.wide_columns = u.exchanged ? tables.gradient_columns : source_columns;
          for (int64_t k = 0; k < tiles.count; ++k) {
            const int64_t first = tiles.begin(k), at = (tap * u.narrows + first) * pitch;
            Pixels shifted = pixels;
            shifted.narrow += first;
            tiles.kernels(k).pixels(
                shifted, {partial + at, block == 0, block_end == t.height, own + at, pitch, job.factors[n]});
          }
        }
      }
    }
  }
  move_result<false>(job, u, pitch, own);
}

// ---- convolutions on a grid of one pixel: linear maps

static void run_linear(const WeightJob& job, const WeightUnit& u, float* memory) {
  const TaskRow& t = *u.task;
  const Side narrow = side_of(job, u, false), wide = side_of(job, u, true);
  const UnitMemory sizes = convolution_memory(job, u);
  float *own = memory, *narrow_copy = own + sizes.result, *wide_copy = narrow_copy + sizes.narrow;
  const int64_t pitch = wide.pitch, vectors = pitch / kVector;
  const Tiles tiles(u.narrows, vectors);
  move_result<true>(job, u, pitch, own);
  for (int64_t n = 0; n < job.images; n += kTogether) {
    const int64_t images = least(kTogether, job.images - n);
    for (int64_t tap = 0; tap < u.taps; ++tap) {
      const int64_t y = (u.tap + tap) / t.kernel_x * t.dilation_y - t.pad_y;
      const int64_t x = (u.tap + tap) % t.kernel_x * t.dilation_x - t.pad_x;
      if (y < 0 || x < 0 || y >= source_height(job, t) || x >= source_width(job, t)) continue;
      for (int wider = 0; wider < 2; ++wider) {
        const bool is_wide = wider == 1;
        const Side& side = is_wide ? wide : narrow;
        const bool gradient = is_wide == u.exchanged;
        const BufferRow& b = *side.buffer;
        const int64_t at = gradient ? 0 : y / side.factor_y * b.row_stride + x / side.factor_x * b.pixel_stride;
        for (int64_t k = 0; k < images; ++k)
          copy_pixel(side, image_of(job, b, n + k) + (at + side.channel) * b.bytes,
                     (is_wide ? wide_copy : narrow_copy) + k * side.pitch);
      }
      for (int64_t k = 0; k < tiles.count; ++k) {
        const int64_t first = tiles.begin(k);
        tiles.kernels(k).images(narrow_copy + first, narrow.pitch, wide_copy, pitch, job.factors + n, images,
                                own + (tap * u.narrows + first) * pitch, pitch);
      }
    }
  }
  move_result<false>(job, u, pitch, own);
}

// ---- sums and products

// A vector of channels of one pixel, or their one channel.
static FASTEBM_INLINE Vector channels_of(const Side& side, const char* image, int64_t y, int64_t x, int64_t c) {
  const BufferRow& b = *side.buffer;
  const char* p = image + (y / side.factor_y * b.row_stride + x / side.factor_x * b.pixel_stride + side.channel) * b.bytes;
  return side.broadcast ? splat(number_at(p, b.bytes)) : load_some(p + c * b.bytes, b.bytes, side.count - c);
}

template <bool product>
static void run_sum(const WeightJob& job, const WeightUnit& u) {
  const TaskRow& t = *u.task;
  WeightUnit other = u;
  other.exchanged = !u.exchanged;
  const Side gradient = side_of(job, u, true), source = product ? side_of(job, other, true) : Side{};
  for (int64_t c = 0; c < u.wides; c += kWidest) {
    const int64_t vectors = least(kWideVectors, vectors_of(u.wides - c));
    float* result = job.results[t.result] + u.wide + c;
    const auto term = [&](const char* g, const char* s, int64_t y, int64_t x, int64_t j, Vector sum)
                          __attribute__((always_inline)) {
      const Vector v = channels_of(gradient, g, y, x, c + j * kVector);
      return product ? multiply_add(v, channels_of(source, s, y, x, c + j * kVector), sum) : v + sum;
    };
    if (t.per_pixel) {
      for (int64_t y = u.row; y < u.row + u.rows; ++y)
        for (int64_t x = 0; x < t.width; ++x)
          for (int64_t j = 0; j < vectors; ++j) {
            float* p = result + (y * t.width + x) * t.out + j * kVector;
            const int64_t count = u.wides - c - j * kVector;
            Vector sum = load_some(reinterpret_cast<const char*>(p), 4, count);
            for (int64_t n = 0; n < job.images; ++n) {
              const char* s = product ? image_of(job, *source.buffer, n) : nullptr;
              sum = multiply_add(splat(job.factors[n]), term(image_of(job, *gradient.buffer, n), s, y, x, j, Vector{}), sum);
            }
            store_some(p, sum, count);
          }
      continue;
    }
    Vector sums[kWideVectors];
    for (int64_t j = 0; j < vectors; ++j)
      sums[j] = load_some(reinterpret_cast<const char*>(result + j * kVector), 4, u.wides - c - j * kVector);
    for (int64_t n = 0; n < job.images; ++n) {
      const char *g = image_of(job, *gradient.buffer, n), *s = product ? image_of(job, *source.buffer, n) : nullptr;
      Vector partial[kWideVectors] = {};
      for (int64_t y = 0; y < t.height; ++y)
        for (int64_t x = 0; x < t.width; ++x)
          for (int64_t j = 0; j < vectors; ++j) partial[j] = term(g, s, y, x, j, partial[j]);
      for (int64_t j = 0; j < vectors; ++j) sums[j] = multiply_add(splat(job.factors[n]), partial[j], sums[j]);
    }
    for (int64_t j = 0; j < vectors; ++j) store_some(result + j * kVector, sums[j], u.wides - c - j * kVector);
  }
}

// ---- units

static int64_t memory_of_unit(const WeightJob& job, const WeightUnit& u) {
  if (u.task->kind != WeightKind::convolution) return 0;
  const UnitMemory m = convolution_memory(job, u);
  return m.result + m.partial + m.narrow + m.wide + m.tables;
}

static void run_unit(const WeightJob& job, const WeightUnit& u, float* memory) {
  if (u.task->kind == WeightKind::sum) return run_sum<false>(job, u);
  if (u.task->kind == WeightKind::product) return run_sum<true>(job, u);
  if (u.task->height * u.task->width == 1) return run_linear(job, u, memory);
#if FASTEBM_TILES
  if (suits_tiles(job, u)) return run_tiles(job, u, memory);
#endif
  run_convolution(job, u, memory);
}
