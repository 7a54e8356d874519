// Gradients of weights for one instruction set: the whole body of weight_gradients_<isa>.cpp, which defines
//
//   FASTEBM_ISA      the instruction set: a namespace here, and the end of the name of weight_kernels_<isa>
//   FASTEBM_TARGET   what the compiler may use of it, as a `target` attribute says it; undefined for the baseline
//   FASTEBM_VECTOR   floats in a vector
//   FASTEBM_TILES    1 where there are matrix units
//
// The headers that this one includes stand inside the namespace and under the `target` pragma. They use no template
// of the standard library: its instances would carry wide instructions under names that the rest of the library shares.
#include "weight_gradients.h"

#if !defined(FASTEBM_TARGET) || defined(__x86_64__)

#include "target_begin.h"

namespace fastebm {
namespace FASTEBM_ISA {

#include "weight_gradients_units.h"

}  // namespace FASTEBM_ISA

WeightKernels FASTEBM_JOIN(weight_kernels_, FASTEBM_ISA)() {
  return {FASTEBM_VECTOR, FASTEBM_ISA::kWidest, FASTEBM_ISA::memory_of_unit, FASTEBM_ISA::run_unit};
}

}  // namespace fastebm

#include "target_end.h"

#endif
