// Gradients of weights, compiled for AMX (with AVX-512).
#define FASTEBM_ISA amx
#define FASTEBM_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"
#define FASTEBM_VECTOR 16
#define FASTEBM_TILES 1
#include "weight_gradients_variant.h"
