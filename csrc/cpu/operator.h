// Shared by the CPU operators: torch's stable tensor, checks, chain ids, and a (batch, channel, pixel) view of image batches.
//
// The Python side (fastebm/ops) allocates outputs and checks shapes and dtypes with messages for users; kernels refuse, in one
// line, whatever else would make them touch memory that isn't their own (../checks.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>

#include "../checks.h"
#include "noise.h"

namespace fastebm {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// Enough elements for a thread to be worth waking (about 10 microseconds of noise), and so few that one thread does them all,
// which waits for none that another process keeps from its core.
constexpr int64_t kGrainElements = 8192, kAloneElements = 65536;

inline int64_t grain(int64_t tasks, int64_t elements_of_a_task) {
  if (tasks * elements_of_a_task <= kAloneElements) return std::max<int64_t>(1, tasks);
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_of_a_task));
}

struct Key {
  int64_t seed, step, index;
};

inline Key read_key(const Tensor& key) {
  STD_TORCH_CHECK(key.numel() == 3 && key.is_contiguous() && key.scalar_type() == ScalarType::Long,
                  "key needs 3 contiguous numbers in int64 (seed, step, schedule index)");
  check_memory("key", key);
  const auto* data = static_cast<const int64_t*>(key.const_data_ptr());
  // No table has 2^62 rows, and later rows are found by sums that must not overflow.
  return {data[0], data[1], std::min(data[2], int64_t{1} << 62)};
}

// Ids of the chains of a batch: consecutive from the first, or listed.
class ChainIds {
 public:
  ChainIds(const Tensor& chain_ids, int64_t batch, int64_t step)
      : ids_(static_cast<const int64_t*>(chain_ids.const_data_ptr())), listed_(chain_ids.numel() > 1) {
    check_contiguous("chain_ids", chain_ids, ScalarType::Long);
    STD_TORCH_CHECK(batch == 0 || chain_ids.numel() > 0, "chain_ids needs the id of the first chain, or of all");
    STD_TORCH_CHECK(!listed_ || chain_ids.numel() == batch, "chain_ids lists ", chain_ids.numel(), " ids for a batch of ", batch);
    STD_TORCH_CHECK(step >= 0 && step < kMaxStep, "step ", step, " is outside [0, 2^32): the noise counter would overflow");
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(addressable(step, (*this)[b]), "chain id ", (*this)[b],
                      " is outside [0, 2^56): the noise counter would overflow");
      if (!listed_ && b == 0 && batch > 1) b = batch - 2;  // consecutive ids: the first and the last tell
    }
  }
  int64_t operator[](int64_t b) const { return listed_ ? ids_[b] : ids_[0] + b; }

 private:
  const int64_t* ids_;
  bool listed_;
};

// One tensor seen as (batch, channel, pixel): NCHW has strides (C*P, P, 1), channels-last (C*P, 1, C), a broadcast 0.
template <class T>
struct Image {
  T* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, pixel_stride = 1;

  explicit operator bool() const { return data != nullptr; }
  // True where the elements of one chain lie in row-major (C, H, W) order, so that a stretch is a plain pointer.
  FASTEBM_INLINE bool dense(int64_t channels, int64_t pixels) const {
    return pixel_stride == 1 && (channels == 1 || channel_stride == pixels);
  }
};

struct ImageShape {
  int64_t batch, channels, pixels;
  int64_t elements() const { return channels * pixels; }
  int64_t stretches() const { return (elements() + kStretch - 1) / kStretch; }
};

inline ImageShape image_shape(const Tensor& x) {
  if (x.dim() == 3) return {x.size(0), x.size(1), x.size(2)};
  const int64_t batch = x.size(0);
  return {batch, 1, batch == 0 ? 0 : x.numel() / batch};
}

template <class T>
Image<T> image(const Tensor& x) {
  T* data = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  if (x.dim() == 3) return {data, x.stride(0), x.stride(1), x.stride(2)};
  const ImageShape shape = image_shape(x);
  return {data, shape.elements(), shape.elements(), 1};
}

template <class T>
Image<T> image(const std::optional<Tensor>& x) {
  return x.has_value() ? image<T>(*x) : Image<T>{};
}

// Runs visit(offset into the image, index into the stretch, length) over the runs of one channel that make up a stretch.
template <class T, class U, bool load>
FASTEBM_INLINE void move_stretch(const Image<T>& image, U* __restrict stretch, int64_t b, int64_t begin, int64_t count,
                                 int64_t pixels) {
  int64_t at = 0;
  while (at < count) {
    const int64_t channel = (begin + at) / pixels, pixel = (begin + at) % pixels;
    const int64_t run = std::min(count - at, pixels - pixel);
    T* __restrict base = image.data + b * image.batch_stride + channel * image.channel_stride + pixel * image.pixel_stride;
    if (image.pixel_stride == 1) {
      for (int64_t i = 0; i < run; ++i) {
        if constexpr (load) stretch[at + i] = static_cast<U>(base[i]);
        else base[i] = static_cast<T>(stretch[at + i]);
      }
    } else {
      for (int64_t i = 0; i < run; ++i) {
        if constexpr (load) stretch[at + i] = static_cast<U>(base[i * image.pixel_stride]);
        else base[i * image.pixel_stride] = static_cast<T>(stretch[at + i]);
      }
    }
    at += run;
  }
}

// The values of a stretch as U: in place where they lie in order and have that type, otherwise gathered into `buffer`.
template <class T, class U>
FASTEBM_INLINE const U* read_stretch(const Image<T>& image, U* __restrict buffer, int64_t b, int64_t begin, int64_t count,
                                     const ImageShape& shape) {
  if constexpr (std::is_same_v<std::remove_const_t<T>, U>)
    if (image.dense(shape.channels, shape.pixels)) return image.data + b * image.batch_stride + begin;
  move_stretch<T, U, true>(image, buffer, b, begin, count, shape.pixels);
  return buffer;
}

}  // namespace fastebm
