// Matrix units in plain C++, so that the kernels for them run, and are checked, where there are none (`make sanitize`).
// Part of program_variant.h. Sums are in the order of the instruction; it flushes subnormal numbers, which this does not.
#pragma once

struct EmulatedTile {
  char row[16][64];
};
static thread_local EmulatedTile emulated_tiles[8];

static void emulated_load(int tile, const void* data, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(emulated_tiles[tile].row[r], static_cast<const char*>(data) + r * stride, 64);
}

static void emulated_store(int tile, void* data, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(data) + r * stride, emulated_tiles[tile].row[r], 64);
}

static void emulated_product(int sums, int left, int right) {
  float sum[16];
  uint16_t a[32], b[16][32];
  __builtin_memcpy(b, emulated_tiles[right].row, sizeof b);
  for (int r = 0; r < 16; ++r) {
    __builtin_memcpy(sum, emulated_tiles[sums].row[r], sizeof sum);
    __builtin_memcpy(a, emulated_tiles[left].row[r], sizeof a);
    for (int pair = 0; pair < 16; ++pair)
      for (int one = 0; one < 2; ++one)
        for (int c = 0; c < 16; ++c) sum[c] = fused(widened(a[2 * pair + one]), widened(b[pair][2 * c + one]), sum[c]);
    __builtin_memcpy(emulated_tiles[sums].row[r], sum, sizeof sum);
  }
}

static void configure_tiles() {}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadd(TILE, DATA, STRIDE) emulated_load(TILE, DATA, STRIDE)
#define _tile_stored(TILE, DATA, STRIDE) emulated_store(TILE, DATA, STRIDE)
#define _tile_dpbf16ps(SUMS, LEFT, RIGHT) emulated_product(SUMS, LEFT, RIGHT)
#define _tile_release() static_cast<void>(0)
