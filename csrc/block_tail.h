// The arithmetic of the block tail and the Expand blend, element by element, shared by the host compiler and nvcc.
#pragma once

#include "activations.h"

namespace fastebm {

template <class C>
constexpr C kHalfRoot = C(0x1.6a09e667f3bcdp-1);  // 1 / sqrt(2)

// The mean of a 2x2 window; columns first, so that whole rows can be added before neighbours are.
template <class C>
FASTEBM_INLINE C window_mean(C top_left, C bottom_left, C top_right, C bottom_right) {
  return C(0.25) * ((top_left + bottom_left) + (top_right + bottom_right));
}

// beta primal + (1 - beta) fade, to the last bit `fade` at beta = 0 and `primal` at beta = 1 where both are finite.
template <class C>
FASTEBM_INLINE C blended(C beta, C primal, C fade) {
  return fused(beta, primal, (1 - beta) * fade);
}

// What a unit of gradient at the output is worth in each branch before its activation.
template <class C>
FASTEBM_INLINE C branch_weight(C beta) {
  return beta * kHalfRoot<C>;
}

template <class C>
FASTEBM_INLINE C tail_value(C activated_main, C skip) {
  return (activated_main + skip) * kHalfRoot<C>;
}

}  // namespace fastebm
