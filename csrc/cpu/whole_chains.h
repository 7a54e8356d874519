// Sums over the elements of a chain in the fixed order: lane l of 1024 takes elements l, l + 1024, ... in turn, then the lanes
// fold in halves. In float64; the other backends sum in this very order.
#pragma once

#include <algorithm>

#include "noise.h"

namespace fastebm {

// A sum in the fixed order: lane l of 1024 takes elements l, l + 1024, ... in turn, then the lanes fold in halves. In float64;
// the other backends sum in this very order. Lanes beyond a short chain's last element stay 0 in the fixed order, so that they
// are left out.
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

inline int64_t elements_of_a_chain(const Tensor& x) { return x.size(0) == 0 ? 0 : x.numel() / x.size(0); }

// Refuses states that are not contiguous (batch, ...) in float32 or float64.
inline void check_states(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x must be (batch, ...), got a tensor without dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "the state must be float32 or float64");
  check_contiguous("x", x, x.scalar_type());
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type) {
  const auto sizes = x.sizes();
  check_contiguous(name, tensor, type);
  check_sizes(name, tensor, {sizes.begin(), sizes.end()});
}

inline void check_schedule(const Tensor& schedule, const Tensor& x, int64_t columns) {
  check_contiguous("schedule", schedule, ScalarType::Float);
  STD_TORCH_CHECK((schedule.dim() == 2 || (schedule.dim() == 3 && schedule.size(1) == x.size(0))) && schedule.size(0) > 0 &&
                      schedule.size(schedule.dim() - 1) == columns,
                  "schedule must be (steps, ", columns, ") or (steps, batch, ", columns, ")");
}

inline void check_walls(const std::optional<double>& low, const std::optional<double>& high) {
  STD_TORCH_CHECK(low.value_or(-INFINITY) < high.value_or(INFINITY), "the walls must be numbers with low < high");
}

}  // namespace fastebm
