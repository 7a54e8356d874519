// Gradients of weights, compiled for AVX2.
#define FASTEBM_ISA avx2
#define FASTEBM_TARGET "avx2,fma,f16c"
#define FASTEBM_VECTOR 8
#define FASTEBM_TILES 0
#include "weight_gradients_variant.h"
