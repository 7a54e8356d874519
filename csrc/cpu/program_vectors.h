// The vector type of one instruction set, and how many pixels and outputs a convolution keeps in its registers.
// Part of program_variant.h, which compiles it once for each instruction set.
#pragma once

#if FASTEBM_VECTOR == 16
typedef float Vector __attribute__((vector_size(64), aligned(4)));
#elif FASTEBM_VECTOR == 8
typedef float Vector __attribute__((vector_size(32), aligned(4)));
#else
typedef float Vector __attribute__((vector_size(16), aligned(4)));
#endif

#if FASTEBM_VECTOR == 16
constexpr int kPositions = 12, kPanel = 32;  // 24 accumulators of 32 registers
#elif FASTEBM_VECTOR == 8
constexpr int kPositions = 6, kPanel = 16;  // 12 of 16
#else
constexpr int kPositions = 2, kPanel = 16;  // 8 of 16
#endif
constexpr int kVectors = kPanel / FASTEBM_VECTOR;

static FASTEBM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static FASTEBM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

alignas(64) static const float kZeros[512] = {};
