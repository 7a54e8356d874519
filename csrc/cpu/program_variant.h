// The kernels of fused programs for one instruction set: the whole body of program_<isa>.cpp, which defines
//
//   FASTEBM_ISA      the instruction set: a namespace here, and the end of the name of execute_<isa>
//   FASTEBM_TARGET   what the compiler may use of it, as a `target` attribute says it; undefined for the baseline
//   FASTEBM_VECTOR   floats in a vector
//   FASTEBM_PAIRS    1 where there are products of bfloat16 pairs
//   FASTEBM_TILES    1 where there are matrix units
//
// The headers that this one includes stand inside the namespace and under the `target` pragma. They use no template of the
// standard library: its instances would carry wide instructions under names that the rest of the library shares.
//
// Values are float32 from the accumulators to the stores, whatever buffers hold. A block of at most 32 pixels and 32 channels
// stays in L1 (4 KB) while its epilogue runs over it.
#include "../activations.h"
#include "program.h"

#if !defined(FASTEBM_TARGET) || defined(__x86_64__)

#include "target_begin.h"

namespace fastebm {
namespace FASTEBM_ISA {

#include "program_execute.h"

}  // namespace FASTEBM_ISA

void FASTEBM_JOIN(execute_, FASTEBM_ISA)(const Worker& worker, const InstructionRow& instruction, int64_t begin, int64_t end) {
  FASTEBM_ISA::execute(worker, instruction, begin, end);
}

}  // namespace fastebm

#include "target_end.h"

#endif
