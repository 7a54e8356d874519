// Fused programs, compiled for any CPU of the platform.
#define FASTEBM_ISA baseline
#define FASTEBM_VECTOR 4
#define FASTEBM_PAIRS 0
#define FASTEBM_TILES 0
#include "program_variant.h"
