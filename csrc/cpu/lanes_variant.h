// Lane programs for one instruction set: the whole body of lanes_<isa>.cpp, which defines
//
//   FASTEBM_ISA      the instruction set: a namespace here, and the end of the name of execute_<isa>
//   FASTEBM_TARGET   what the compiler may use of it, as a `target` attribute says it; undefined for the baseline
//   FASTEBM_VECTOR   floats in a vector
//
// lanes_execute.h and lanes_move.h stand inside the namespace and under the `target` pragma. They use no template of the standard library: its
// instances would carry wide instructions under names that the rest of the library shares.
#include "lanes.h"

#if !defined(FASTEBM_TARGET) || defined(__x86_64__)

#include "target_begin.h"

namespace fastebm {
namespace FASTEBM_ISA {

#include "lanes_execute.h"
#include "lanes_move.h"

}  // namespace FASTEBM_ISA

LaneKernels FASTEBM_JOIN(lane_kernels_, FASTEBM_ISA)() {
  return {FASTEBM_ISA::run,     FASTEBM_ISA::update,  FASTEBM_ISA::propose,        FASTEBM_ISA::test_proposal,
          FASTEBM_ISA::refresh, FASTEBM_ISA::kinetic, FASTEBM_ISA::test_trajectory};
}

}  // namespace fastebm

#include "target_end.h"

#endif
