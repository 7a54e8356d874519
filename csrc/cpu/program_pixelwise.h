// All instructions but convolutions (load, gather, pool, softmax, first maximum), pixel by pixel in blocks of up to 32 pixels of
// a row. Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_epilogue.h"
#include "program_team.h"

static void softmax_pixel(const float* in, int64_t count, float* out, bool log_sum) {
  float largest = in[0], sum = 0;
  for (int64_t c = 1; c < count; ++c) largest = in[c] > largest ? in[c] : largest;
  for (int64_t c = 0; c < count; ++c) sum += __builtin_expf(in[c] - largest);
  if (log_sum) out[0] = largest + __builtin_logf(sum);
  else
    for (int64_t c = 0; c < count; ++c) out[c] = __builtin_expf(in[c] - largest) / sum;
}

static void load_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0,
                       int valid) {
  const ProgramJob& job = *w.job;
  const float* in = job.x + n * job.sample + y * job.width + x;
  for (int c = 0; c < valid; ++c) v[c] = c0 + c < i.source_channels ? in[(c0 + c) * job.plane] : 1.0f;
}

static void gather_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x,
                         int64_t c0, int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  const int64_t sy = y - i.pad_y, sx = x - i.pad_x;
  if (sy < 0 || sx < 0 || sy >= b.height * i.kernel_y || sx >= b.width * i.kernel_x) {
    const float fill = i.constant < 0 ? 0.0f : w.job->numbers[i.constant];
    for (int c = 0; c < valid; ++c) v[c] = fill;
    return;
  }
  const char* p = pixel_of(w, b, n, sy / i.kernel_y, sx / i.kernel_x) + (i.source_channel + (i.broadcast ? 0 : c0)) * b.bytes;
  if (i.broadcast) {
    const float h = number_at(p, b.bytes);
    for (int c = 0; c < valid; ++c) v[c] = h;
  } else {
    for_each_channel(p, b.bytes, valid, [&](int c, float h) __attribute__((always_inline)) { v[c] = h; });
  }
}

static void pool_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x, int64_t c0,
                       int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  const int64_t top = y * i.stride_y - i.pad_y, left = x * i.stride_x - i.pad_x;
  for (int64_t sy = most(0, top); sy < least(b.height, top + i.kernel_y); ++sy) {
    for (int64_t sx = most(0, left); sx < least(b.width, left + i.kernel_x); ++sx) {
      for_each_channel(pixel_of(w, b, n, sy, sx) + (i.source_channel + c0) * b.bytes, b.bytes, valid,
                       [&](int c, float h) __attribute__((always_inline)) { v[c] += h; });
    }
  }
}

static void first_maximum_pixel(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x,
                                int64_t c0, int valid) {
  const BufferRow& b = w.job->buffers[i.source];
  const int64_t top = y - y % i.kernel_y, left = x - x % i.kernel_x;
  if (top + i.kernel_y > b.height || left + i.kernel_x > b.width) return;
  float own[kBlock];
  for_each_channel(pixel_of(w, b, n, y, x) + (i.source_channel + c0) * b.bytes, b.bytes, valid,
                   [&](int c, float h) __attribute__((always_inline)) { own[c] = h, v[c] = 1.0f; });
  for (int64_t sy = top; sy < top + i.kernel_y; ++sy) {
    for (int64_t sx = left; sx < left + i.kernel_x; ++sx) {
      const bool before = sy < y || (sy == y && sx < x);
      for_each_channel(pixel_of(w, b, n, sy, sx) + (i.source_channel + c0) * b.bytes, b.bytes, valid,
                       [&](int c, float h) __attribute__((always_inline)) {
                         const bool largest = before ? own[c] > h : own[c] >= h;
                         v[c] = largest ? v[c] : 0.0f;
                       });
    }
  }
}

static void softmax_block(const Worker& w, const InstructionRow& i, float* __restrict v, int64_t n, int64_t y, int64_t x,
                          int64_t c0, int valid) {
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
            case Kind::first_maximum: first_maximum_pixel(w, i, p, n, y, x0 + k, c0, valid); break;
            default: softmax_block(w, i, p, n, y, x0 + k, c0, valid);
          }
        }
        Block block(v, static_cast<int>(c0), valid);
        block.run[block.runs++] = {n, 0, y, x0, 1, count};
        epilogue(w, i, block);
      }
    }
  }
}
