// What run_lanes, run_lane_chain and run_lane_sampler share: the checked program, blocks of samples, and the memory of workers.
#pragma once

#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "lanes_check.h"
#include "lanes_team.h"
#include "operator.h"

namespace fastebm {

inline LaneKernels chosen_kernels() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return lane_kernels_avx512();
  if (active_isa() == Isa::avx2) return lane_kernels_avx2();
#endif
  return lane_kernels_baseline();
}

inline void check_readable(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has another dtype than kernels read");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, " has no memory");
}

// Work in a call below which other threads are not woken: waiting for one that another process keeps from its core costs more.
constexpr double kAloneNanoseconds = 500e3;

struct LaneJob {
  LaneProgram program;
  LaneKernels kernels;
  int64_t batch, sample, width;
  double cost;  // nanoseconds of a sample and step
  const float* x;
  const float* conditions;  // (batch, C)
  float* energies;          // (batch,), or a row of it for each step
};

// Samples side by side: as many as keep the arena in a core's cache, at least 32 where there are so many, for which products read
// their weights once, and no more than give every thread some.
inline int64_t width_for(const LaneProgram& program, int64_t batch, int64_t threads) {
  if (batch < 4) return 1;
  constexpr int64_t kCache = 512 << 10, kLeast = 32;
  const auto fits = [&](int64_t width) { return width * program.header->arena * int64_t{sizeof(float)} <= kCache; };
  const auto shared = [&](int64_t width) { return threads == 1 ? width < batch : 2 * width * threads <= batch; };
  int64_t width = kLaneGroup;
  while (width < kMaxWidth && shared(width) && (width < kLeast || fits(2 * width))) width *= 2;
  return width;
}

// plane[e, lane] = from[sample of the lane, e] of `numbers`. Lanes beyond the batch repeat its last sample.
template <class T>
void load_plane(const LaneJob& job, const T* from, int64_t numbers, float* plane, int64_t first) {
  constexpr int64_t kElements = 16;
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t begin = 0; begin < numbers; begin += kElements) {
    const int64_t end = std::min(numbers, begin + kElements);
    for (int64_t l = 0; l < job.width; ++l) {
      const T* sample = from + (first + std::min(l, count - 1)) * numbers;
      for (int64_t e = begin; e < end; ++e) plane[e * job.width + l] = static_cast<float>(sample[e]);
    }
  }
}

inline void store_plane(const LaneJob& job, const float* plane, float* to, int64_t first) {
  constexpr int64_t kElements = 16;
  const int64_t count = std::min(job.width, job.batch - first);
  for (int64_t begin = 0; begin < job.sample; begin += kElements) {
    const int64_t end = std::min(job.sample, begin + kElements);
    for (int64_t l = 0; l < count; ++l)
      for (int64_t e = begin; e < end; ++e) to[(first + l) * job.sample + e] = plane[e * job.width + l];
  }
}

// Memory of all workers, not initialised: a checked program reads nothing that it didn't write.
class Arenas {
 public:
  Arenas(int64_t workers, int64_t numbers) : numbers_((numbers + 15) / 16 * 16) {
    memory_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(workers * numbers_) * sizeof(float)));
    STD_TORCH_CHECK(memory_ != nullptr, "there is no memory for ", workers * numbers_, " numbers");
  }
  Arenas(const Arenas&) = delete;
  ~Arenas() { std::free(memory_); }
  float* operator[](int64_t worker) const { return memory_ + worker * numbers_; }

 private:
  int64_t numbers_;
  float* memory_;
};

// Runs run_block(job, arena, memory, first) for every block of samples, on as many threads as the work of `steps` steps is worth.
// `numbers(job)` is the memory that a worker needs behind its arena.
template <class Numbers, class RunBlock>
void run_blocks(LaneJob job, int64_t steps, const Numbers& numbers, const RunBlock& run_block) {
  if (job.batch == 0) return;
  const double work = static_cast<double>(job.batch) * static_cast<double>(steps) * job.cost;
  const int64_t threads = work < kAloneNanoseconds ? 1 : torch::stable::get_num_threads();
  job.width = width_for(job.program, job.batch, threads);
  job.kernels = chosen_kernels();
  const int64_t blocks = (job.batch + job.width - 1) / job.width, workers = std::min(threads, blocks);
  const int64_t arena = (job.program.header->arena * job.width + kLaneScratch + 15) / 16 * 16;
  const Arenas arenas(workers, arena + numbers(job));
  LaneTeam::run(workers, blocks, [&](int64_t worker, int64_t block) {
    LaneJob own = job;
    const int64_t first = block * job.width, count = std::min(job.width, job.batch - first);
    if (own.width > 1) own.width = (count + kLaneGroup - 1) / kLaneGroup * kLaneGroup;  // the last block may be narrower
    load_plane(own, own.x, own.sample, arenas[worker], first);
    load_plane(own, own.conditions, own.program.header->conditions, arenas[worker] + own.sample * own.width, first);
    run_block(own, arenas[worker], arenas[worker] + arena, first);
  });
}

struct ReadyLanes {
  std::shared_ptr<const CheckedLanes> checked;
  LaneJob job{};
};

inline ReadyLanes ready(const Tensor& energies, const Tensor& x, const Tensor& code, const Tensor& tables, const Tensor& constants,
                 const Tensor& conditions) {
  check_readable(code, "code", ScalarType::Long);
  check_readable(tables, "tables", ScalarType::Int);
  check_readable(constants, "constants", ScalarType::Float);
  check_readable(conditions, "conditions", ScalarType::Float);
  check_readable(x, "x", ScalarType::Float);
  check_readable(energies, "energies", ScalarType::Float);
  STD_TORCH_CHECK(x.dim() >= 1, "x must be (batch, ...), got a tensor without dimensions");
  ReadyLanes made;
  made.checked = checked_lanes(static_cast<const int64_t*>(code.const_data_ptr()), code.numel(),
                               static_cast<const int32_t*>(tables.const_data_ptr()), tables.numel());
  LaneJob& job = made.job;
  job.program = made.checked->program;
  const LaneHeader& header = *job.program.header;
  STD_TORCH_CHECK(constants.numel() == header.constants, "this program reads ", header.constants, " constants, got ",
                  constants.numel());
  job.program.constants = static_cast<const float*>(constants.const_data_ptr());
  job.cost = made.checked->cost;
  job.batch = x.size(0);
  job.sample = header.sample;
  STD_TORCH_CHECK(job.batch == 0 || x.numel() / job.batch == job.sample, "this program is for samples of ", job.sample,
                  " numbers, got x with samples of ", job.batch == 0 ? 0 : x.numel() / job.batch);
  STD_TORCH_CHECK(conditions.dim() == 2 && conditions.size(0) == job.batch && conditions.size(1) == header.conditions,
                  "this program is for conditions of ", header.conditions, " numbers for each of ", job.batch, " samples");
  job.conditions = static_cast<const float*>(conditions.const_data_ptr());
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.energies = static_cast<float*>(energies.mutable_data_ptr());
  check_apart("energies", energies, "x", x);
  check_apart("energies", energies, "constants", constants);
  check_apart("energies", energies, "conditions", conditions);
  return made;
}

}  // namespace fastebm
