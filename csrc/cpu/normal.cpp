// fastebm_cpp::normal: standard normal noise as a function of (seed, step, chain, stream, element).
#include "fill.h"

namespace fastebm {

void normal(Tensor out, Tensor key, Tensor chain_ids, int64_t stream) { fill_tensor<NormalNoise>(out, key, chain_ids, stream); }

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("normal", TORCH_BOX(&fastebm::normal)); }
