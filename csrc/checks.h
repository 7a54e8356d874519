// What kernels ask of tensors before they follow a pointer: anyone can call them from Python with anything.
//
// fastebm/ops refuses with messages for users before it calls a kernel; what is refused here is a caller's mistake, in one line.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace fastebm {

// A tensor whose storage was emptied has a shape all the same.
inline void check_memory(const char* name, const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, " has no memory");
}

inline void check_dtype(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has another dtype than kernels read");
}

inline void check_contiguous(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  check_dtype(name, tensor, type);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  check_memory(name, tensor);
}

inline void check_sizes(const char* name, const torch::stable::Tensor& tensor, const std::vector<int64_t>& sizes) {
  const auto given = tensor.sizes();
  STD_TORCH_CHECK(given.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), given.begin()), name,
                  " has another shape than it must have");
}

// Whether no two elements lie at one place: from the nearest to the farthest, dimensions step over one another.
inline bool overlaps_itself(const torch::stable::Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dimensions.begin(), dimensions.end());
  int64_t span = 1;
  bool nested = true;  // each stride passes over all that lies within the smaller ones
  for (const auto& [stride, size] : dimensions) {
    nested = nested && stride >= span;
    span += stride * (size - 1);
  }
  if (nested || tensor.numel() == 0) return false;
  if (dimensions.front().first <= 0) return true;
  // Dimensions that interleave may still miss one another; only their addresses tell. No usual layout comes here.
  std::vector<int64_t> addresses{0};
  for (const auto& [stride, size] : dimensions) {
    const size_t before = addresses.size();
    for (int64_t i = 1; i < size; ++i)
      for (size_t a = 0; a < before; ++a) addresses.push_back(addresses[a] + stride * i);
  }
  std::sort(addresses.begin(), addresses.end());
  return std::adjacent_find(addresses.begin(), addresses.end()) != addresses.end();
}

// The bytes from the first element to the last.
inline std::pair<const char*, const char*> memory_of(const torch::stable::Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

inline void check_apart(const char* name, const torch::stable::Tensor& written, const char* other_name,
                        const torch::stable::Tensor& other) {
  const auto [begin, end] = memory_of(written);
  const auto [other_begin, other_end] = memory_of(other);
  STD_TORCH_CHECK(end <= other_begin || other_end <= begin, name, " and ", other_name,
                  " share memory, which would be written while it is read");
}

}  // namespace fastebm
