// How the workers of a team divide one instruction among them.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_vectors.h"

struct Range {
  int64_t begin, end;
};

static FASTEBM_INLINE Range share(int64_t count, int64_t part, int64_t parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Panels first, whose weights a worker then reads alone; where there are too few, the pixels.
static FASTEBM_INLINE void share_convolution(const Worker& w, int64_t panels, int64_t units, Range& panel, Range& unit) {
  panel = {0, panels};
  unit = {0, units};
  if (panels >= w.parts) panel = share(panels, w.part, w.parts);
  else unit = share(units, w.part, w.parts);
}
