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
  if (active_isa() == Isa::avx512_bf16) return execute_avx512_bf16;
  if (active_isa() == Isa::avx512) return execute_avx512;
  if (active_isa() == Isa::avx2) return execute_avx2;
#endif
  return execute_baseline;
}

// Work of a parallel region below which other threads are not woken: waiting for one that another process keeps from its core
// costs more.
constexpr double kAloneNanoseconds = 100e3;

// Nanoseconds that an instruction takes one thread with AVX-512 for an image, about.
double cost_of(const InstructionRow& i) {
  constexpr double kMultiplyAdd = 0.02, kStep = 0.1;
  const double window = static_cast<double>(i.kernel_y) * static_cast<double>(i.kernel_x);
  const double each = i.kind == Kind::convolution ? kMultiplyAdd * window * static_cast<double>(i.source_channels) : kStep * window;
  return static_cast<double>(i.channels) * static_cast<double>(i.height) * static_cast<double>(i.width) *
         (each + kStep * static_cast<double>(i.count));
}

void run_segments(const ProgramJob& job, Execute execute, Worker worker, int64_t end) {
  for (int64_t s = 0; s < job.header->segments; ++s) {
    const SegmentRow& segment = job.segments[s];
    for (int64_t n = worker.chunk_start; n < end; n += segment.images) {
      worker.segment_start = n;
      const int64_t last = std::min(end, n + segment.images);
      for (int64_t i = 0; i < segment.count; ++i) {
        const InstructionRow& instruction = job.instructions[segment.first + i];
        if (!job.header->team || static_cast<double>(last - n) * cost_of(instruction) < kAloneNanoseconds) {
          Worker alone = worker;
          alone.parts = 1;
          execute(alone, instruction, n, last);
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
  const Layout layout = job.header->layout;
  const bool panels = layout == Layout::panels && job.header->panel == (isa >= Isa::avx512 ? 32 : 16);
  STD_TORCH_CHECK((layout == Layout::tiles && isa == Isa::amx) || (layout == Layout::pairs && isa == Isa::avx512_bf16) || panels,
                  "the weights of this program were packed for another instruction set than '", isa_name(isa), "'");
}

// Contiguous tensors, and the workspace, whose end was worked out before.
void check_outside(const Tensor& tensor, const char* name, const char* begin, const char* end) {
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(data >= end || data + tensor.numel() * static_cast<int64_t>(tensor.element_size()) <= begin, name,
                  " and the workspace share memory, which would be written while it is read");
}

Sample sample_of(const Tensor& x) {
  if (x.dim() == 4) return {x.size(1), x.size(2), x.size(3)};
  int64_t channels = 1;
  for (int64_t d = 1; d < x.dim(); ++d) channels *= x.size(d);
  return {channels, 1, 1};
}

void check_sample(const CheckedProgram& program, const Sample& given) {
  const Sample &s = program.sample, &g = program.gradient;
  STD_TORCH_CHECK(!program.loads || s == given, "this program is for samples of ", s.channels, "x", s.height, "x", s.width,
                  " numbers, got x with samples of ", given.channels, "x", given.height, "x", given.width);
  STD_TORCH_CHECK(
      !program.writes_gradient || (given.channels == g.channels && given.height >= g.height && given.width >= g.width),
      "this program writes a gradient of ", g.channels, "x", g.height, "x", g.width, " numbers, got x with samples of ",
      given.channels, "x", given.height, "x", given.width);
}

// A tensor as its need says, and the image that it is.
ConstantView checked_constant(const ConstantNeed& need, const Tensor& tensor, size_t number, const ProgramHeader& header) {
  const bool weight = need.uses == ConstantNeed::weight;
  const bool short_weights = header.layout == Layout::tiles || header.layout == Layout::pairs;
  const ScalarType type = weight && short_weights ? ScalarType::BFloat16 : ScalarType::Float;
  const auto sizes = tensor.sizes();
  bool right = tensor.scalar_type() == type && tensor.is_contiguous() && tensor.const_data_ptr() != nullptr;
  if (weight) {
    right = right && sizes.size() == need.sizes.size() && std::equal(need.sizes.begin(), need.sizes.end(), sizes.begin());
    STD_TORCH_CHECK(right, "constant ", number, " must be a contiguous weight of the program's shape in ",
                    short_weights ? "bfloat16" : "float32");
    return {tensor.const_data_ptr(), 1, 1, 0};
  }
  const int64_t lanes = header.bytes == 2 ? 32 : 16;
  right = right && sizes.size() == 3 && sizes[2] >= need.sizes[0] && sizes[2] % lanes == 0 &&
          (sizes[0] == 1 || sizes[0] >= need.sizes[1]) && (sizes[1] == 1 || sizes[1] >= need.sizes[2]);
  STD_TORCH_CHECK(right, "constant ", number, " must be a contiguous float32 image (", need.sizes[1], " or 1, ", need.sizes[2],
                  " or 1, ", need.sizes[0], " and its filling)");
  return {tensor.const_data_ptr(), sizes[0], sizes[1], sizes[2]};
}

}  // namespace

ReadyProgram::ReadyProgram(const Tensor& x, const Tensor& code, const std::vector<Tensor>& constants, const Tensor& workspace)
    : program_(checked_program(code)) {
  ProgramJob& job = job_;
  const CheckedProgram& program = *program_;
  STD_TORCH_CHECK(x.dim() > 0, "x must be (batch, ...), got a tensor without dimensions");
  check_contiguous("x", x, ScalarType::Float);
  job.header = program.header;
  job.buffers = program.buffers;
  job.instructions = program.instructions;
  job.epilogues = program.epilogues;
  job.segments = program.segments;
  check_weights(job);
  const Sample sample = sample_of(x);
  check_sample(program, sample);
  whole_ = program.writes_energies && program.whole_gradient && program.gradient == sample;

  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.numel() >= program.workspace,
                  "the workspace must be contiguous bytes, ", program.workspace, " or more, got ", workspace.numel());
  job.workspace = static_cast<char*>(workspace.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(job.workspace) % 64 == 0 && (job.workspace != nullptr || program.workspace == 0),
                  "the workspace must begin at a multiple of 64");
  const char* workspace_end = job.workspace + program.workspace;
  check_outside(x, "x", job.workspace, workspace_end);

  STD_TORCH_CHECK(constants.size() > 0 && constants[0].scalar_type() == ScalarType::Float && constants[0].dim() == 1,
                  "the first constant must be the numbers, a vector in float32");
  check_contiguous("constant 0", constants[0], ScalarType::Float);
  STD_TORCH_CHECK(constants[0].numel() >= program.numbers, "the first constant must have ", program.numbers, " numbers, got ",
                  constants[0].numel());
  STD_TORCH_CHECK(constants.size() >= program.constants.size(), "this program reads ", program.constants.size(),
                  " constants, got ", constants.size());
  views_.resize(program.constants.size());
  for (size_t k = 0; k < program.constants.size(); ++k) {
    if (k > 0 && program.constants[k].uses == ConstantNeed::none) continue;
    if (k > 0) views_[k] = checked_constant(program.constants[k], constants[k], k, *job.header);
    check_outside(constants[k], "a constant", job.workspace, workspace_end);
  }
  job.constants = views_.data();
  job.numbers = static_cast<const float*>(constants[0].const_data_ptr());
  job.x = static_cast<const float*>(x.const_data_ptr());
  job.batch = x.size(0);
  job.sample = sample.channels * sample.height * sample.width;
  job.plane = sample.height * sample.width;
  job.width = sample.width;
}

void ReadyProgram::run(float* energies, float* gradient) const {
  if (job_.batch == 0) return;
  ProgramJob job = job_;
  job.energies = energies;
  job.gradient = gradient;
  if (!whole_) {  // what a program doesn't write is zero
    std::fill_n(energies, job.batch, 0.0f);
    std::fill_n(gradient, job.batch * job.sample, 0.0f);
  }
  const Execute execute = chosen_variant();
  const int64_t chunk = job.header->chunk, chunks = (job.batch + chunk - 1) / chunk;
  if (job.header->team) {
    const int64_t threads = torch::stable::get_num_threads();
    for (int64_t c = 0; c < chunks; ++c)
      run_segments(job, execute, {&job, job.workspace, c * chunk, 0, 0, threads}, std::min(job.batch, (c + 1) * chunk));
    return;
  }
  double cost = 0;
  for (int64_t i = 0; i < job.header->instructions; ++i) cost += cost_of(job.instructions[i]);
  const bool alone = static_cast<double>(job.batch) * cost < kAloneNanoseconds;
  const int64_t workers = alone ? 1 : std::min(job.header->workers, chunks);
  // A chunk has the same slot however many threads there are: gradients of weights read what is kept there.
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t behind) {
    for (int64_t w = first; w < behind; ++w)
      for (int64_t c = w; c < chunks; c += workers)
        run_segments(job, execute, {&job, job.workspace + c % job.header->workers * job.header->slot, c * chunk, 0, 0, 1},
                     std::min(job.batch, (c + 1) * chunk));
  });
}

void check_results(const Tensor& energies, int64_t count, const Tensor& gradient, const Tensor& x, const Tensor& workspace) {
  check_contiguous("energies", energies, ScalarType::Float);
  check_contiguous("gradient", gradient, ScalarType::Float);
  STD_TORCH_CHECK(energies.numel() == count, "there must be ", count, " energies, got room for ", energies.numel());
  STD_TORCH_CHECK(gradient.numel() == x.numel(), "the gradient must have x's ", x.numel(), " numbers, got ", gradient.numel());
  check_apart("energies", energies, "x", x);
  check_apart("gradient", gradient, "x", x);
  check_apart("energies", energies, "gradient", gradient);
  check_apart("energies", energies, "the workspace", workspace);
  check_apart("gradient", gradient, "the workspace", workspace);
}

void run_program(Tensor energies, Tensor gradient, Tensor x, Tensor code, std::vector<Tensor> constants, Tensor workspace) {
  const ReadyProgram program(x, code, constants, workspace);
  check_results(energies, x.size(0), gradient, x, workspace);
  program.run(static_cast<float*>(energies.mutable_data_ptr()), static_cast<float*>(gradient.mutable_data_ptr()));
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) { library.impl("run_program", TORCH_BOX(&fastebm::run_program)); }
