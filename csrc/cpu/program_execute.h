// Runs one instruction of a fused program on some images.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_convolution.h"
#include "program_convolution_taps.h"
#include "program_pixelwise.h"
#if FASTEBM_TILES
#include "program_convolution_amx.h"
#endif

// Zeros on both sides of the rows that convolutions with padding read, and behind dense ones what a tile may read.
static void clear_margins(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < i.count; ++k) {
    const EpilogueRow& step = w.job->epilogues[i.first + k];
    if (step.op != EpilogueOp::store && step.op != EpilogueOp::activate_keeping) continue;
    const BufferRow& b = w.job->buffers[step.buffer];
    const int64_t left = b.margin * b.pixel_stride * b.bytes,
                  right = (b.row_stride - (b.margin + b.width) * b.pixel_stride) * b.bytes;
    if (left + right == 0) continue;
    if (b.image_stride < b.pixel_stride) {  // images lie pixel by pixel beside each other
      for (int64_t n = begin; n < end; ++n)
        for (int64_t y = 0; y < b.height; ++y)
          for (int64_t x = 0; x < b.margin; ++x) {
            __builtin_memset(pixel_of(w, b, n, y, x - b.margin), 0, b.image_stride * b.bytes);
            __builtin_memset(pixel_of(w, b, n, y, b.width + x), 0, b.image_stride * b.bytes);
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

static void convolution(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
#if FASTEBM_TILES
  if (w.job->header->layout == Layout::tiles) return convolution_tiles(w, i, begin, end);
#elif FASTEBM_PAIRS
  if (w.job->header->layout == Layout::pairs && taps_are_outputs(i)) return convolution_taps(w, i, begin, end);
  if (w.job->header->layout == Layout::pairs) return convolution_panels<PairProduct>(w, i, begin, end);
#endif
  if (w.job->header->bytes == 2) convolution_panels<WidenedProduct>(w, i, begin, end);
  else convolution_panels<FloatProduct>(w, i, begin, end);
}

static void execute(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  if (i.kind == Kind::convolution) convolution(w, i, begin, end);
  else pixelwise(w, i, begin, end);
  if (w.part == 0) clear_margins(w, i, begin, end);
}
