// A block of pixels and channels in L1, and the addresses of its pixels in the buffers of a fused program.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_vectors.h"

// Pixels that follow one another in a row (dx = 1) or are the same of consecutive images (dn = 1), in coordinates of the grid.
struct Run {
  int64_t n, dn, y, x, dx;
  int count;
};

struct Block {
  Block(float* v, int channel, int valid) : v(v), channel(channel), valid(valid) {}  // no runs, and their memory as it is

  float* v;            // rows of 32
  int channel, valid;  // the first channel, and how many there are
  int runs = 0;
  Run run[32];
};

static FASTEBM_INLINE int64_t image_index(const Worker& w, const BufferRow& b, int64_t n) {
  return n - (b.images < w.job->header->chunk ? w.segment_start : w.chunk_start);
}

static FASTEBM_INLINE char* pixel_of(const Worker& w, const BufferRow& b, int64_t n, int64_t y, int64_t x) {
  return w.slot + b.offset +
         (image_index(w, b, n) * b.image_stride + y * b.row_stride + (b.margin + x) * b.pixel_stride) * b.bytes;
}

// Calls f(row of the block, address of its pixel in the buffer) for every pixel of a block.
template <class F>
static FASTEBM_INLINE void for_each_pixel(const Worker& w, const InstructionRow& i, const EpilogueRow& step, const Block& block,
                                          F f) {
  const BufferRow& b = w.job->buffers[step.buffer];
  const int64_t channel = step.channel + (step.broadcast ? 0 : block.channel);
  float* v = block.v;
  for (int r = 0; r < block.runs; ++r) {
    const Run& run = block.run[r];
    const int64_t y = (i.start_y + i.step_y * run.y) / step.factor_y;
    if (step.factor_x == 1 || run.dx == 0) {
      char* p = pixel_of(w, b, run.n, y, (i.start_x + i.step_x * run.x) / step.factor_x) + channel * b.bytes;
      const int64_t stride = (run.dn * b.image_stride + run.dx * i.step_x * b.pixel_stride) * b.bytes;
      for (int k = 0; k < run.count; ++k, p += stride, v += kBlock) f(v, p);
    } else {
      for (int k = 0; k < run.count; ++k, v += kBlock)
        f(v, pixel_of(w, b, run.n, y, (i.start_x + i.step_x * (run.x + k)) / step.factor_x) + channel * b.bytes);
    }
  }
}
