// Fused programs for the instruction set "amx".
#include "../activations.h"
#include "program.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define FASTEBM_VECTOR 16
#define FASTEBM_TILES 1

namespace fastebm {
namespace amx {

#include "program_kernels.h"

}  // namespace amx

void execute_amx(const Worker& worker, const InstructionRow& instruction, int64_t begin, int64_t end) {
  amx::execute(worker, instruction, begin, end);
}

}  // namespace fastebm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
