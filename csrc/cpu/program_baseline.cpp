// Fused programs for the instruction set "baseline".
#include "../activations.h"
#include "program.h"

#define FASTEBM_VECTOR 4
#define FASTEBM_TILES 0

namespace fastebm {
namespace baseline {

#include "program_kernels.h"

}  // namespace baseline

void execute_baseline(const Worker& worker, const InstructionRow& instruction, int64_t begin, int64_t end) {
  baseline::execute(worker, instruction, begin, end);
}

}  // namespace fastebm
