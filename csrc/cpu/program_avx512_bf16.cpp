// Fused programs, compiled for AVX-512 with products of bfloat16 pairs (AVX512-BF16).
#define FASTEBM_ISA avx512_bf16
#define FASTEBM_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define FASTEBM_VECTOR 16
#define FASTEBM_PAIRS 1
#define FASTEBM_TILES 0
#include "program_variant.h"
