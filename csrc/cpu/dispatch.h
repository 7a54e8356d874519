// From a tensor's dtype to a C++ type, and to the memory behind it.
#pragma once

#include "operator.h"

namespace fastebm {

// What a dtype is computed in: one rounding at the end, of float32 arithmetic except for float64.
template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

// run<T>() with T the type of x's elements.
template <class Run>
void dispatch(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return run.template operator()<float>();
    case ScalarType::Double: return run.template operator()<double>();
    case ScalarType::BFloat16: return run.template operator()<BFloat16>();
    case ScalarType::Half: return run.template operator()<Half>();
    default: STD_TORCH_CHECK(false, "the dtype must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastebm
