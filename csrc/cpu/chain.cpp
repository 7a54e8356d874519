// fastebm_cpp::run_chain: runs a fused program and a Langevin step in turn, once for each row of `energies`, in one call.
//
// The two are those of program.cpp and langevin.cpp, so that a chain has the same bits as its updates one by one. One call saves
// the way through Python in between, a fifth of an update and more on images of 8x8.
#include "chain.h"

#include <vector>

namespace fastebm {

void run_chain(const StepOptions& options, Tensor energies, Tensor x, Tensor gradient, Tensor code, std::vector<Tensor> constants,
               Tensor workspace) {
  read_key(options.key);  // refuses what is not (seed, step, schedule index)
  const ReadyProgram program(x, code, constants, workspace);
  STD_TORCH_CHECK(energies.dim() == 2, "energies must be (steps, batch), got ", energies.dim(), " dimensions");
  const int64_t steps = energies.size(0), batch = x.size(0);
  check_results(energies, steps * batch, gradient, x, workspace);
  auto* energies_data = static_cast<float*>(energies.mutable_data_ptr());
  auto* gradient_data = static_cast<float*>(gradient.mutable_data_ptr());
  auto* key_data = static_cast<int64_t*>(options.key.mutable_data_ptr());
  for (int64_t i = 0; i < steps; ++i) {
    program.run(energies_data + i * batch, gradient_data);
    langevin_step(options, x, x, gradient);
    ++key_data[1];
    ++key_data[2];
  }
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("run_chain", TORCH_BOX(&fastebm::WithStepOptions<&fastebm::run_chain>::call));
}
