// Ends what target_begin.h began.
#if defined(FASTEBM_TARGET)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
