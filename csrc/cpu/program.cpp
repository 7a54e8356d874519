// fastebm_cpp::run_program: an energy and its gradient by a list of instructions, with the images divided among threads.
//
// A worker takes a chunk of at most 16 images through the whole program without waiting for anyone, some at a time where they are
// large, so that most of what one instruction writes is read from the core's own cache by the next. With fewer images than
// threads all workers divide each instruction instead. Either way the value of a number depends on neither.
#include "chain.h"
#include "variants.h"

namespace fastebm {
namespace {

Execute chosen_variant() {
#if defined(__x86_64__)
  if (active_isa() == Isa::amx) return execute_amx;
  if (active_isa() == Isa::avx512) return execute_avx512;
  if (active_isa() == Isa::avx2) return execute_avx2;
#endif
  return execute_baseline;
}

// The tables of a program's code, one behind the other; `at` moves on.
template <class Row>
const Row* table(const int64_t*& at, int64_t rows) {
  const auto* first = reinterpret_cast<const Row*>(at);
  at += rows * static_cast<int64_t>(sizeof(Row) / sizeof(int64_t));
  return first;
}

void run_segments(const ProgramJob& job, Execute execute, Worker worker, int64_t end) {
  for (int64_t s = 0; s < job.header->segments; ++s) {
    const SegmentRow& segment = job.segments[s];
    for (int64_t n = worker.chunk_start; n < end; n += segment.images) {
      worker.segment_start = n;
      const int64_t last = std::min(end, n + segment.images);
      for (int64_t i = 0; i < segment.count; ++i) {
        const InstructionRow& instruction = job.instructions[segment.first + i];
        if (!job.header->team) {
          execute(worker, instruction, n, last);
          continue;
        }
        torch::stable::parallel_for(0, worker.parts, 1, [&](int64_t first, int64_t behind) {
          for (int64_t part = first; part < behind; ++part) {
            Worker member = worker;
            member.part = part;
            execute(member, instruction, n, last);
          }
        });
      }
    }
  }
}

void check_weights(const ProgramJob& job) {
  const auto isa = active_isa();
  const bool tiles = job.header->layout == Layout::tiles, panels = job.header->layout == Layout::panels;
  STD_TORCH_CHECK((tiles && isa == Isa::amx) || (panels && job.header->panel == (isa >= Isa::avx512 ? 32 : 16)),
                  "the weights of this program were packed for another instruction set than '", isa_name(isa), "'");
}

// Kernels read as many numbers as the program says, whatever x has.
void check_samples(const ProgramJob& job, const Tensor& x) {
  const bool image = x.dim() == 4;
  int64_t channels = 1;
  for (int64_t d = 1; d < (image ? 2 : x.dim()); ++d) channels *= x.size(d);
  const int64_t height = image ? x.size(2) : 1, width = image ? x.size(3) : 1;
  for (int64_t k = 0; k < job.header->instructions; ++k) {
    const InstructionRow& i = job.instructions[k];
    if (i.kind != Kind::load || i.source_channels == 0) continue;
    STD_TORCH_CHECK(channels == i.source_channels && height == i.height && width == i.width, "this program is for samples of ",
                    i.source_channels, "x", i.height, "x", i.width, " numbers, got x with samples of ", channels, "x", height,
                    "x", width);
  }
}

}  // namespace

ReadyProgram::ReadyProgram(const Tensor& x, const Tensor& code, const std::vector<Tensor>& constants, const Tensor& workspace) {
  ProgramJob& job = job_;
  const int64_t* at = static_cast<const int64_t*>(code.const_data_ptr());
  STD_TORCH_CHECK(code.numel() >= 16 && at[0] == 1, "code does not begin as a program does");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "x must be contiguous float32");
  job.header = table<ProgramHeader>(at, 1);
  job.buffers = table<BufferRow>(at, job.header->buffers);
  job.instructions = table<InstructionRow>(at, job.header->instructions);
  job.epilogues = table<EpilogueRow>(at, job.header->epilogues);
  job.segments = table<SegmentRow>(at, job.header->segments);
  STD_TORCH_CHECK(at - static_cast<const int64_t*>(code.const_data_ptr()) == code.numel(),
                  "code has another length than its header says");
  STD_TORCH_CHECK(job.header->bytes != 8, "float64 programs run in the reference only");
  check_weights(job);
  check_samples(job, x);
  STD_TORCH_CHECK(workspace.numel() >= job.header->slot * job.header->workers, "the workspace has ", workspace.numel(),
                  " bytes, needed are ", job.header->slot * job.header->workers);
  for (const Tensor& constant : constants) {
    const bool image = constant.dim() == 3;
    views_.push_back({constant.const_data_ptr(), image ? constant.size(0) : 1, image ? constant.size(1) : 1,
                      image ? constant.size(2) : constant.numel()});
  }
  job.constants = views_.data();
  STD_TORCH_CHECK(constants.size() > 0 && constants[0].scalar_type() == ScalarType::Float,
                  "the first constant must be the numbers, in float32");
  job.numbers = static_cast<const float*>(views_[0].data);
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.batch = x.size(0);
  if (job.batch == 0) return;
  job.sample = x.numel() / job.batch;
  job.plane = x.dim() == 4 ? x.size(2) * x.size(3) : 1;
  job.width = x.dim() == 4 ? x.size(3) : 1;
  job.workspace = static_cast<char*>(workspace.mutable_data_ptr());
}

void ReadyProgram::run(float* energies, float* gradient) const {
  if (job_.batch == 0) return;
  ProgramJob job = job_;
  job.energies = energies;
  job.gradient = gradient;
  const Execute execute = chosen_variant();
  const int64_t chunk = job.header->chunk, chunks = (job.batch + chunk - 1) / chunk;
  if (job.header->team) {
    const int64_t threads = torch::stable::get_num_threads();
    for (int64_t c = 0; c < chunks; ++c)
      run_segments(job, execute, {&job, job.workspace, c * chunk, 0, 0, threads}, std::min(job.batch, (c + 1) * chunk));
    return;
  }
  const int64_t workers = std::min(job.header->workers, chunks);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t behind) {
    for (int64_t w = first; w < behind; ++w)
      for (int64_t c = w; c < chunks; c += workers)
        run_segments(job, execute, {&job, job.workspace + w * job.header->slot, c * chunk, 0, 0, 1},
                     std::min(job.batch, (c + 1) * chunk));
  });
}

void run_program(Tensor energies, Tensor gradient, Tensor x, Tensor code, std::vector<Tensor> constants, Tensor workspace) {
  ReadyProgram(x, code, constants, workspace)
      .run(static_cast<float*>(energies.mutable_data_ptr()), static_cast<float*>(gradient.mutable_data_ptr()));
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("run_program", TORCH_BOX(&fastebm::run_program)); }
