// Fused programs for the instruction set "avx512".
#include "../activations.h"
#include "program.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define FASTEBM_VECTOR 16
#define FASTEBM_TILES 0

namespace fastebm {
namespace avx512 {

#include "program_kernels.h"

}  // namespace avx512

void execute_avx512(const Worker& worker, const InstructionRow& instruction, int64_t begin, int64_t end) {
  avx512::execute(worker, instruction, begin, end);
}

}  // namespace fastebm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
