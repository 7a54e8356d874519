// The two buffers of a task: where their pixels lie, and copies of some of their channels as float32 for one unit.
// Part of weight_gradients_variant.h, which compiles it once for each instruction set.
#pragma once

#include "weight_gradients_vectors.h"

// One of the two buffers as a unit reads it.
struct Side {
  const BufferRow* buffer;
  int64_t channel, count;  // channels, or one that stands for `count`
  bool broadcast;
  bool direct;    // read where it lies; otherwise from a copy of some rows
  int64_t pitch;  // numbers of a pixel in the copy
  int64_t factor_y, factor_x;

  int64_t pixel() const { return direct ? buffer->pixel_stride : pitch; }
  int64_t row() const { return direct ? buffer->row_stride : pitch * buffer->width; }
};

static FASTEBM_INLINE int64_t vectors_of(int64_t numbers) { return (numbers + kVector - 1) / kVector; }

// Whether whole vectors can be read from every pixel: behind the last channel lies the pixel's own filling.
static FASTEBM_INLINE bool filled(const BufferRow& b, int64_t channel, int64_t count) {
  return channel + vectors_of(count) * kVector <= least(b.pixel_stride, b.image_stride);
}

static Side side_of(const WeightJob& job, const WeightUnit& u, bool wide) {
  const TaskRow& t = *u.task;
  const bool gradient = wide == u.exchanged;
  const int64_t begin = wide ? u.wide : u.narrow, count = wide ? u.wides : u.narrows;
  Side side{};
  side.buffer = job.buffers + (gradient ? t.gradient_buffer : t.source_buffer);
  side.broadcast = (gradient ? t.gradient_broadcast : t.source_broadcast) != 0;
  side.channel = (gradient ? t.gradient_channel : t.source_channel) + (side.broadcast ? 0 : begin);
  side.count = count;
  side.factor_y = gradient ? t.gradient_factor_y : t.source_factor_y;
  side.factor_x = gradient ? t.gradient_factor_x : t.source_factor_x;
  side.pitch = vectors_of(count) * kVector;
  // Where each number is multiplied once for every pair of channels, a copy doesn't pay.
  side.direct = t.kernel_y * t.kernel_x == 1 && side.buffer->bytes == 4 && !side.broadcast &&
                (!wide || filled(*side.buffer, side.channel, count));
  return side;
}

// Pixel (0, 0) of an image in a buffer, as program_blocks.h has it.
static FASTEBM_INLINE const char* image_of(const WeightJob& job, const BufferRow& b, int64_t n) {
  const int64_t slot = n / job.header->chunk, image = n % job.header->chunk;
  return job.workspace + slot * job.header->slot + b.offset + (image * b.image_stride + b.margin * b.pixel_stride) * b.bytes;
}

// The channels of a pixel as float32, filled up with zeros to whole vectors.
static FASTEBM_INLINE void copy_pixel(const Side& side, const char* p, float* out) {
  const int64_t bytes = side.buffer->bytes;
  if (side.broadcast) {
    const Vector all = splat(number_at(p, bytes));
    for (int64_t c = 0; c < side.pitch; c += kVector) store(out + c, all);
    return;
  }
  int64_t c = 0;
  for (; c + kVector <= side.count; c += kVector) store(out + c, load_numbers(p + c * bytes, bytes));
  if (c < side.count) store(out + c, load_some(p + c * bytes, bytes, side.count - c));
}

// Rows [begin, end) of an image.
static void copy_rows(const Side& side, const char* image, int64_t begin, int64_t end, float* __restrict out) {
  const BufferRow& b = *side.buffer;
  const int64_t step = b.pixel_stride * b.bytes, channel = side.channel * b.bytes;
  for (int64_t y = begin; y < end; ++y) {
    const char* p = image + y * b.row_stride * b.bytes + channel;
    for (int64_t x = 0; x < b.width; ++x, p += step, out += side.pitch) copy_pixel(side, p, out);
  }
}

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The places of a grid along one axis whose source, at place * stride + shift, lies in [0, size).
static FASTEBM_INLINE Range inside(int64_t count, int64_t stride, int64_t shift, int64_t size) {
  const int64_t begin = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  const int64_t behind = size - shift <= 0 ? 0 : (size - shift + stride - 1) / stride;
  return {begin, least(count, behind)};
}

static FASTEBM_INLINE int64_t source_height(const WeightJob& job, const TaskRow& t) {
  return t.source_height ? t.source_height : job.buffers[t.source_buffer].height * t.source_factor_y;
}
static FASTEBM_INLINE int64_t source_width(const WeightJob& job, const TaskRow& t) {
  return t.source_width ? t.source_width : job.buffers[t.source_buffer].width * t.source_factor_x;
}
