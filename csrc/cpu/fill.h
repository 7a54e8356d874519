// Fills (B, ...) with noise: the shared body of `normal` and `uniform`.
#pragma once

#include "operator.h"

namespace fastebm {

template <class Noise_, class T_>
struct FillTypes {
  using Noise = Noise_;
  using T = T_;
};

template <class T>
struct Fill {
  T* out;
  int64_t elements, stretches, seed, step, stream;
  const ChainIds* chain_ids;
};

template <class Types, Isa isa>
FASTEBM_INLINE void fill_body(const Fill<typename Types::T>& fill, int64_t begin, int64_t end) {
  alignas(64) float drawn[kStretch];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / fill.stretches, first = task % fill.stretches * kStretch;
    const int64_t count = std::min(kStretch, fill.elements - first);
    const NoiseAddress at = noise_address(fill.seed, fill.step, (*fill.chain_ids)[b], fill.stream);
    draw_stretch<typename Types::Noise, isa>(drawn, static_cast<uint32_t>(first / 4), count, at);
    auto* __restrict out = fill.out + b * fill.elements + first;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<typename Types::T>(drawn[i]);
  }
}
FASTEBM_VARIANTS(fill, (const Fill<typename Kernel::T>& job, int64_t begin, int64_t end), (job, begin, end))

template <class Noise, class T>
void fill_as(Tensor& out, const Key& key, const ChainIds& chain_ids, int64_t batch, int64_t stream) {
  const int64_t elements = out.numel() / batch, stretches = (elements + kStretch - 1) / kStretch;
  const Fill<T> job{static_cast<T*>(out.mutable_data_ptr()), elements, stretches, key.seed, key.step, stream, &chain_ids};
  torch::stable::parallel_for(0, batch * stretches, grain(batch * stretches, std::min(elements, kStretch)),
                              [&](int64_t begin, int64_t end) { fill<FillTypes<Noise, T>>(job, begin, end); });
}

template <class Noise>
void fill_tensor(Tensor out, const Tensor& key_tensor, const Tensor& chain_tensor, int64_t stream) {
  const Key key = read_key(key_tensor);
  STD_TORCH_CHECK(out.dim() > 0, "out must be (batch, ...), got a tensor without dimensions");
  STD_TORCH_CHECK(stream >= 0 && stream < 256, "the stream must be in [0, 256), got ", stream);
  check_contiguous("out", out, out.scalar_type());
  check_apart("out", out, "key", key_tensor);
  check_apart("out", out, "chain_ids", chain_tensor);
  const int64_t batch = out.size(0);
  const ChainIds chain_ids(chain_tensor, batch, key.step);
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(out.numel() / batch <= int64_t{1} << 34, "a chain has at most 2^34 numbers, got ", out.numel() / batch);
  switch (out.scalar_type()) {
    case ScalarType::Float: return fill_as<Noise, float>(out, key, chain_ids, batch, stream);
    case ScalarType::Double: return fill_as<Noise, double>(out, key, chain_ids, batch, stream);
    case ScalarType::BFloat16: return fill_as<Noise, BFloat16>(out, key, chain_ids, batch, stream);
    case ScalarType::Half: return fill_as<Noise, Half>(out, key, chain_ids, batch, stream);
    default: STD_TORCH_CHECK(false, "noise is drawn as float32, float64, bfloat16 or float16");
  }
}

}  // namespace fastebm
