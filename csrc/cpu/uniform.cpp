// fastebm_cpp::uniform: uniform noise in (0, 1] as a function of (seed, step, chain, stream, element).
#include "fill.h"

namespace fastebm {

void uniform(Tensor out, Tensor key, Tensor chain_ids, int64_t stream) { fill_tensor<UniformNoise>(out, key, chain_ids, stream); }

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("uniform", TORCH_BOX(&fastebm::uniform)); }
