// Compiles one function for several instruction sets and chooses among them at run time.
//
// Function-level targets keep the rest of the library at the baseline, so that a build made on a new CPU runs on an old one.
// The symbol names carry the instruction set; tests/packaging/test_machine_code.py looks for wide instructions anywhere else.
#pragma once

#include <string>

#include "../philox.h"

namespace fastebm {

// avx512_bf16 is avx512 with products of bfloat16 pairs, amx that with matrix units for bfloat16; only fused programs use either.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

const char* isa_name(Isa isa);
Isa isa_from_name(const std::string& name);  // throws std::runtime_error on an unknown name
Isa best_isa();                              // what this CPU can run
Isa active_isa();                            // what runs: the best, or what FASTEBM_CPU or set_active_isa asked for
void set_active_isa(Isa isa);                // throws std::runtime_error where the CPU lacks it

#if defined(__x86_64__)
#define FASTEBM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#if defined(__clang__)
#define FASTEBM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#else
#define FASTEBM_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#endif
// Defines NAME<Kernel>(PARAMS), which runs NAME_body<Kernel, Isa> ARGS compiled for the active instruction set. PARAMS and ARGS
// carry their own parentheses; Kernel is a class that names the types.
#define FASTEBM_VARIANTS(NAME, PARAMS, ARGS)                                  \
  template <class Kernel>                                                     \
  FASTEBM_TARGET_AVX512 __attribute__((noinline)) void NAME##_avx512 PARAMS { \
    NAME##_body<Kernel, Isa::avx512> ARGS;                                    \
  }                                                                           \
  template <class Kernel>                                                     \
  FASTEBM_TARGET_AVX2 __attribute__((noinline)) void NAME##_avx2 PARAMS {     \
    NAME##_body<Kernel, Isa::avx2> ARGS;                                      \
  }                                                                           \
  template <class Kernel>                                                     \
  __attribute__((noinline)) void NAME##_baseline PARAMS {                     \
    NAME##_body<Kernel, Isa::baseline> ARGS;                                  \
  }                                                                           \
  template <class Kernel>                                                     \
  inline void NAME PARAMS {                                                   \
    switch (active_isa()) {                                                   \
      case Isa::amx:                                                          \
      case Isa::avx512_bf16:                                                  \
      case Isa::avx512: return NAME##_avx512<Kernel> ARGS;                    \
      case Isa::avx2: return NAME##_avx2<Kernel> ARGS;                        \
      default: return NAME##_baseline<Kernel> ARGS;                           \
    }                                                                         \
  }
#else
#define FASTEBM_VARIANTS(NAME, PARAMS, ARGS) \
  template <class Kernel>                    \
  inline void NAME PARAMS {                  \
    NAME##_body<Kernel, Isa::baseline> ARGS; \
  }
#endif

}  // namespace fastebm
