// Gradients of weights, compiled for any CPU of the platform.
#define FASTEBM_ISA baseline
#define FASTEBM_VECTOR 4
#define FASTEBM_TILES 0
#include "weight_gradients_variant.h"
