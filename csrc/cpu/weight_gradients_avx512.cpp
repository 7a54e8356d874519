// Gradients of weights, compiled for AVX-512.
#define FASTEBM_ISA avx512
#define FASTEBM_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define FASTEBM_VECTOR 16
#define FASTEBM_TILES 0
#include "weight_gradients_variant.h"
