// From here to target_end.h, functions are compiled for the instruction set of FASTEBM_TARGET, which the files that end in
// _variant.h explain. Included once for each instruction set, so without a guard.
#define FASTEBM_PRAGMA_TEXT(TEXT) _Pragma(#TEXT)
#define FASTEBM_PRAGMA(TEXT) FASTEBM_PRAGMA_TEXT(TEXT)
#define FASTEBM_JOIN_TEXT(A, B) A##B
#define FASTEBM_JOIN(A, B) FASTEBM_JOIN_TEXT(A, B)

#if defined(FASTEBM_TARGET)
#include <immintrin.h>
#if defined(__clang__)
FASTEBM_PRAGMA(clang attribute push(__attribute__((target(FASTEBM_TARGET))), apply_to = function))
#elif FASTEBM_VECTOR == 16
#pragma GCC push_options
FASTEBM_PRAGMA(GCC target(FASTEBM_TARGET, "prefer-vector-width=512"))
#else
#pragma GCC push_options
FASTEBM_PRAGMA(GCC target(FASTEBM_TARGET))
#endif
#endif
