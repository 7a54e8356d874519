// What makes a lane program safe to run: every number in its code and tables is checked before a kernel follows it.
//
// Both are tensors that anyone may change at any time; so kernels run from the copy that was checked, and a call only compares
// the two.
#pragma once

#include <memory>
#include <vector>

#include "lanes.h"

namespace fastebm {

struct CheckedLanes {
  std::vector<int64_t> code;
  std::vector<int32_t> tables;
  std::vector<int64_t> direct;
  LaneProgram program{};  // without constants
  double cost = 0;        // nanoseconds that a sample and its update take one thread with AVX-512, about
};

// The program of a code and its tables, checked now or when the same ones were seen before. Throws with one line where it breaks
// a rule.
std::shared_ptr<const CheckedLanes> checked_lanes(const int64_t* code, int64_t count, const int32_t* tables, int64_t entries);

}  // namespace fastebm
