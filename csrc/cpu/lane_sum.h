// Sums over the elements of a chain in the fixed order: lane l of 1024 takes elements l, l + 1024, ... in turn, then the lanes
// fold in halves. In float64; the other backends sum in this very order.
#pragma once

#include <algorithm>

#include "noise.h"

namespace fastebm {

// Lanes beyond a short chain's last element stay 0 in the fixed order, so that they are left out.
class LaneSum {
 public:
  FASTEBM_INLINE explicit LaneSum(int64_t elements) : width_(1) {
    while (width_ < std::min(elements, kStretch)) width_ *= 2;
    std::fill_n(lanes, width_, 0.0);
  }
  FASTEBM_INLINE double fold() {
    for (int64_t half = width_ / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
  }
  alignas(64) double lanes[kStretch];

 private:
  int64_t width_;
};

}  // namespace fastebm
