// CUDA: uniform noise in (0, 1] as a function of (seed, step, chain, stream, element).
#include "fill.h"

namespace fastebm::cuda {

const char* launch_uniform(const FillArguments& arguments, Stream stream) { return launch_fill<UniformNoise>(arguments, stream); }

}  // namespace fastebm::cuda
