// fastebm_cpp::run_chain: as many Langevin updates as `energies` has rows, each a run of a fused program and a step, in one call.
//
// The two are those of program.cpp and langevin.cpp as they are, so that a chain is the same bits as one update after the other. What
// it saves is the way through Python in between, a fifth of an update and more on images of 8x8.
#include "chain.h"

#include <vector>

namespace fastebm {

void run_chain(Tensor energies, Tensor x, Tensor gradient, Tensor code, std::vector<Tensor> constants, Tensor workspace, Tensor schedule,
               Tensor key, Tensor chain_ids, std::optional<double> clamp_min, std::optional<double> clamp_max,
               std::optional<double> gradient_clip, std::optional<double> norm_clip, std::optional<Tensor> mask,
               std::optional<Tensor> known, std::optional<Tensor> data_target, std::optional<Tensor> data_term_weight, double data_term_hinge) {
  read_key(key);  // refuses what is not (seed, step, schedule index)
  const ReadyProgram program(x, code, constants, workspace);
  const int64_t steps = energies.size(0), batch = x.size(0);
  auto* energies_data = static_cast<float*>(energies.mutable_data_ptr());
  auto* gradient_data = static_cast<float*>(gradient.mutable_data_ptr());
  auto* key_data = static_cast<int64_t*>(key.mutable_data_ptr());
  for (int64_t i = 0; i < steps; ++i) {
    program.run(energies_data + i * batch, gradient_data);
    langevin_step(x, x, gradient, schedule, key, chain_ids, clamp_min, clamp_max, gradient_clip, norm_clip, mask, known, data_target,
                  data_term_weight, data_term_hinge);
    ++key_data[1];
    ++key_data[2];
  }
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("run_chain", TORCH_BOX(&fastebm::run_chain)); }
