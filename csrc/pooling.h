// Where the 2x2 windows of an average pool lie in memory, for all kernels of the block tail.
#pragma once

#include <cstdint>

namespace fastebm {

// Pooled elements are numbered as they lie: (plane, row, pixel, channel). Channels-last has `inner` channels side by side
// in a pixel, and a plane for each sample; NCHW has inner = 1, and a plane for each sample and channel.
struct Pooling {
  int64_t pooled, height, width, inner;  // elements in all, and the extent of a pooled plane
  int64_t input_row, input_plane;        // elements; an odd input has a row or column more than the windows
};

// Of contiguous (B, C, H, W), either format, and a tensor (B, C, H / 2, W / 2) alike.
template <class Tensor>
Pooling pooling_of(const Tensor& input, const Tensor& pooled) {
  const bool channels_last = input.size(1) > 1 && input.stride(1) == 1;
  const int64_t inner = channels_last ? input.size(1) : 1, row = input.size(3) * inner;
  return {pooled.numel(), pooled.size(2), pooled.size(3), inner, row, input.size(2) * row};
}

}  // namespace fastebm
