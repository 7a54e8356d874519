// Convolutions by fused multiply-adds: pixels are broadcast, a panel of outputs stays in registers.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#include "program_epilogue.h"
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

// Adds inputs [0, count) of one tap to the accumulators of all positions.
static FASTEBM_INLINE void tap(Vector (&acc)[kPositions][kVectors], const float* const (&a)[kPositions],
                               const float* __restrict b, int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    Vector weight[kVectors];
    for (int j = 0; j < kVectors; ++j) weight[j] = *reinterpret_cast<const Vector*>(b + c * kPanel + j * FASTEBM_VECTOR);
#pragma GCC unroll 16
    for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[p][j] = multiply_add(a[p][c], weight[j], acc[p][j]);
  }
}

static void convolution_panels(const Worker& w, const InstructionRow& i, int64_t begin, int64_t end) {
  const BufferRow& source = w.job->buffers[i.source];
  const float* weights = static_cast<const float*>(w.job->constants[i.constant].data);
  const int64_t plane = i.height * i.width, pixels = (end - begin) * plane;
  const int64_t panels = (i.channels + kPanel - 1) / kPanel, taps = i.kernel_y * i.kernel_x;
  Range panel_range, unit_range;
  share_convolution(w, panels, (pixels + kPositions - 1) / kPositions, panel_range, unit_range);
  constexpr int64_t kInputs = 256;  // of bfloat16 inputs so many are widened at a time: 12 KB
  alignas(64) float v[kPositions * kBlock];
  alignas(64) float wide[kPositions][kInputs];
  for (int64_t unit = unit_range.begin; unit < unit_range.end; ++unit) {
    const int64_t first = unit * kPositions;
    const int positions = static_cast<int>(least(kPositions, pixels - first));
    Block block{v, 0, 0, 0, {}};
    const char* window[kPositions];  // where the first tap reads, or would read
    int64_t top[kPositions], left[kPositions];
    for (int p = 0; p < kPositions; ++p) {
      const int64_t q = first + (p < positions ? p : positions - 1);
      const int64_t n = begin + q / plane, y = q % plane / i.width, x = q % i.width;
      top[p] = y * i.stride_y - i.pad_y;
      left[p] = x * i.stride_x - i.pad_x;
      window[p] = pixel_of(w, source, n, 0, 0) +
                  (top[p] * source.row_stride + left[p] * source.pixel_stride + i.source_channel) * source.bytes;
      if (p >= positions) continue;
      if (p == 0 || x == 0) block.run[block.runs++] = {n, 0, y, x, 1, 0};
      ++block.run[block.runs - 1].count;
    }
    for (int64_t panel = panel_range.begin; panel < panel_range.end; ++panel) {
      Vector acc[kPositions][kVectors] = {};
      const float* b = weights + panel * taps * i.source_channels * kPanel;
      for (int64_t ky = 0, t = 0; ky < i.kernel_y; ++ky)
        for (int64_t kx = 0; kx < i.kernel_x; ++kx, ++t) {
          const int64_t down = ky * i.dilation_y, right = kx * i.dilation_x;
          const int64_t offset = (down * source.row_stride + right * source.pixel_stride) * source.bytes;
          const char* base[kPositions];
          bool any = false;
          for (int p = 0; p < kPositions; ++p) {
            const uint64_t y = static_cast<uint64_t>(top[p] + down), x = static_cast<uint64_t>(left[p] + right);
            const bool inside = y < static_cast<uint64_t>(source.height) && x < static_cast<uint64_t>(source.width);
            base[p] = inside ? window[p] + offset : nullptr;
            any |= inside;
          }
          if (!any) continue;
          for (int64_t c = 0; c < i.source_channels; c += kInputs) {
            const int64_t count = least(kInputs, i.source_channels - c);
            const float* a[kPositions];
            for (int p = 0; p < kPositions; ++p) {
              if (base[p] == nullptr) {
                a[p] = kZeros;
              } else if (source.bytes == 4) {
                a[p] = reinterpret_cast<const float*>(base[p]) + c;
              } else {
                const uint16_t* h = reinterpret_cast<const uint16_t*>(base[p]) + c;
                for (int64_t k = 0; k < count; ++k) wide[p][k] = widened(h[k]);
                a[p] = wide[p];
              }
            }
            tap(acc, a, b + (t * i.source_channels + c) * kPanel, count);
          }
        }
      for (int p = 0; p < kPositions; ++p) {
        for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(v + p * kBlock + j * FASTEBM_VECTOR) = acc[p][j];
        for (int c = kPanel; c < kBlock; ++c) v[p * kBlock + c] = 0;
      }
      block.channel = static_cast<int>(panel * kPanel);
      block.valid = static_cast<int>(least(kPanel, i.channels - block.channel));
      epilogue(w, i, block);
    }
  }
}
