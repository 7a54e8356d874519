// The matrix units of x86 (AMX), or their emulation: eight tiles of 16 rows of 64 bytes.
// Part of the variants for AMX, which compile it in their namespaces.
#pragma once

#include "program_rows.h"

#if defined(FASTEBM_EMULATE_TILES)
#include "tile_emulation.h"
#else
struct TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

alignas(64) static const TileConfiguration kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static FASTEBM_INLINE void configure_tiles() { asm volatile("ldtilecfg %0" ::"m"(kTiles)); }
#endif
