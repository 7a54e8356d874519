// CUDA: standard normal noise as a function of (seed, step, chain, stream, element).
#include "fill.h"

namespace fastebm::cuda {

const char* launch_normal(const FillArguments& arguments, Stream stream) { return launch_fill<NormalNoise>(arguments, stream); }

}  // namespace fastebm::cuda
