// Fused programs for the instruction set "avx2".
#include "../activations.h"
#include "program.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTEBM_VECTOR 8
#define FASTEBM_TILES 0

namespace fastebm {
namespace avx2 {

#include "program_kernels.h"

}  // namespace avx2

void execute_avx2(const Worker& worker, const InstructionRow& instruction, int64_t begin, int64_t end) {
  avx2::execute(worker, instruction, begin, end);
}

}  // namespace fastebm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
