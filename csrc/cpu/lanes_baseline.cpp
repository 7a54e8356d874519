// Lane programs, compiled for the baseline.
#define FASTEBM_ISA baseline
#define FASTEBM_VECTOR 4
#include "lanes_variant.h"
