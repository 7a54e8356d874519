// fastebm_cpp::weight_gradients: gradients of weights from the buffers that a fused program left in its workspace.
//
// Results are divided into units: taps, outputs and inputs of a convolution, each of which one thread sums over all images. So no
// number depends on how many threads there are. Threads take units as they come to them, the largest first.
#include "weight_gradients.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "operator.h"
#include "program_check.h"
#include "variants.h"

namespace fastebm {
namespace {

constexpr int64_t kLimit = int64_t{1} << 31;

WeightKernels chosen_kernels() {
#if defined(__x86_64__)
  if (active_isa() == Isa::amx) return weight_kernels_amx();
  if (active_isa() >= Isa::avx512) return weight_kernels_avx512();
  if (active_isa() == Isa::avx2) return weight_kernels_avx2();
#endif
  return weight_kernels_baseline();
}

// ---- the rules of fastebm/ops/weight_gradients.py, in the same order

class TaskCheck {
 public:
  TaskCheck(const CheckedProgram& program, const TaskRow& task, int64_t number) : p_(program), t_(task), number_(number) {}

  void run() const {
    within("kind", static_cast<int64_t>(t_.kind), 0, static_cast<int64_t>(WeightKind::product) + 1);
    within("out", t_.out, 1);
    within("inner", t_.inner, 1);
    within("height", t_.height, 1);
    within("width", t_.width, 1);
    within("kernel_y", t_.kernel_y, 1);
    within("kernel_x", t_.kernel_x, 1);
    within("stride_y", t_.stride_y, 1);
    within("stride_x", t_.stride_x, 1);
    within("dilation_y", t_.dilation_y, 1);
    within("dilation_x", t_.dilation_x, 1);
    within("gradient_factor_y", t_.gradient_factor_y, 1);
    within("gradient_factor_x", t_.gradient_factor_x, 1);
    within("source_factor_y", t_.source_factor_y, 1);
    within("source_factor_x", t_.source_factor_x, 1);
    within("result", t_.result, 0);
    within("gradient_channel", t_.gradient_channel, 0);
    within("source_channel", t_.source_channel, 0);
    within("source_height", t_.source_height, 0);
    within("source_width", t_.source_width, 0);
    within("pad_y", t_.pad_y, 1 - kLimit);
    within("pad_x", t_.pad_x, 1 - kLimit);
    within("per_pixel", t_.per_pixel, 0, 2);
    within("gradient_broadcast", t_.gradient_broadcast, 0, 2);
    within("source_broadcast", t_.source_broadcast, 0, 2);
    const int64_t slot = p_.header->slot;
    unless(t_.height * t_.width <= (int64_t{1} << 20) + 4 * slot, "its grid of ", t_.height, "x", t_.width,
           " is out of proportion to a slot of ", slot, " bytes");
    const BufferRow& gradient = buffer("gradient_buffer", t_.gradient_buffer, t_.gradient_channel,
                                       t_.gradient_broadcast ? 1 : t_.out);
    grid(t_.gradient_buffer, gradient, t_.gradient_factor_y, t_.gradient_factor_x);
    if (t_.kind == WeightKind::sum) {
      unless(t_.source_buffer == -1, "SUM has no source_buffer, it must be -1, got ", t_.source_buffer);
      return;
    }
    const int64_t channels = t_.kind == WeightKind::convolution ? t_.inner : t_.out;
    const BufferRow& source = buffer("source_buffer", t_.source_buffer, t_.source_channel, t_.source_broadcast ? 1 : channels);
    if (t_.kind == WeightKind::product) return grid(t_.source_buffer, source, t_.source_factor_y, t_.source_factor_x);
    unless(!t_.per_pixel, "a convolution is not per_pixel");
    const int64_t height = source.height * t_.source_factor_y, width = source.width * t_.source_factor_x;
    unless(t_.source_height <= height && t_.source_width <= width, "a source of ", t_.source_height, "x", t_.source_width,
           " is beyond buffer ", t_.source_buffer, " of ", height, "x", width);
  }

  template <class... Rest>
  void unless(bool holds, const Rest&... rule) const {
    STD_TORCH_CHECK(holds, "tasks that can't run: task ", number_, ": ", rule...);
  }

 private:
  const CheckedProgram& p_;
  const TaskRow& t_;
  int64_t number_;

  void within(const char* name, int64_t number, int64_t low, int64_t high = kLimit) const {
    unless(low <= number && number < high, name, " must be in [", low, ", ", high, "), got ", number);
  }

  const BufferRow& buffer(const char* name, int64_t number, int64_t channel, int64_t count) const {
    within(name, number, 0, p_.header->buffers);
    unless(p_.kept[number], "buffer ", number, " does not hold every image when the program has run: it must be kept");
    const BufferRow& b = p_.buffers[number];
    unless(channel + count <= b.channels, "channels to ", channel + count, " of ", b.channels, " in buffer ", number);
    return b;
  }

  void grid(int64_t number, const BufferRow& b, int64_t factor_y, int64_t factor_x) const {
    unless((t_.height - 1) / factor_y < b.height && (t_.width - 1) / factor_x < b.width, "a grid of ", t_.height, "x", t_.width,
           " is beyond buffer ", number, " of ", b.height, "x", b.width, " pixels");
  }
};

std::vector<int64_t> result_shape(const TaskRow& t) {
  if (t.kind == WeightKind::convolution) return {t.kernel_y * t.kernel_x, t.out, t.inner};
  if (t.per_pixel) return {t.height, t.width, t.out};
  return {t.out};
}

void check_results(const std::vector<Tensor>& results, const Tensor& factors, const Tensor& workspace) {
  std::vector<std::pair<const char*, const char*>> places;
  for (size_t r = 0; r < results.size(); ++r) {
    const std::string name = "result " + std::to_string(r);
    check_contiguous(name.c_str(), results[r], ScalarType::Float);
    check_apart(name.c_str(), results[r], "factors", factors);
    check_apart(name.c_str(), results[r], "the workspace", workspace);
    if (results[r].numel() > 0) places.push_back(memory_of(results[r]));
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i)
    STD_TORCH_CHECK(places[i - 1].second <= places[i].first, "two results share memory, and both are written");
}

// The tasks, copied: whoever owns the tensor may change it while threads follow it.
std::vector<TaskRow> checked_tasks(const CheckedProgram& program, const Tensor& tasks, const std::vector<Tensor>& results) {
  check_dtype("tasks", tasks, ScalarType::Long);
  STD_TORCH_CHECK(tasks.dim() == 2 && tasks.size(1) == kTaskFields && tasks.is_contiguous(),
                  "tasks must be a contiguous int64 table (tasks, ", kTaskFields, ") on the CPU");
  check_memory("tasks", tasks);
  const auto* rows = static_cast<const TaskRow*>(tasks.const_data_ptr());
  std::vector<TaskRow> found(rows, rows + tasks.size(0));
  std::vector<int64_t> owner(results.size(), -1);
  for (size_t k = 0; k < found.size(); ++k) {
    const TaskRow& t = found[k];
    const TaskCheck check(program, t, static_cast<int64_t>(k));
    check.run();
    check.unless(t.result < static_cast<int64_t>(results.size()), "it has result ", t.result, ", got ", results.size(), " results");
    check.unless(owner[t.result] < 0, "result ", t.result, " is task ", owner[t.result], "'s");
    owner[t.result] = static_cast<int64_t>(k);
    const std::vector<int64_t> shape = result_shape(t);
    const auto given = results[t.result].sizes();
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    STD_TORCH_CHECK(given.size() == shape.size() && std::equal(shape.begin(), shape.end(), given.begin()), "result ", t.result,
                    " must be (", wanted, ")");
  }
  return found;
}

// ---- units

constexpr double kAloneNanoseconds = 100e3;  // as in program.cpp: below it no other thread is woken
// Taps times numbers of the narrow side in a unit, at most: 110 KB of sums for 64 of the wide side. The wide side's rows are
// copied once for them.
constexpr int64_t kUnitNumbers = 440, kMostNarrow = 48;
constexpr int64_t kUnitsOfThread = 4;

int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

// Nanoseconds that one number of a unit's result takes one thread with AVX-512 for an image, about.
double cost_of(const TaskRow& t) {
  constexpr double kMultiplyAdd = 0.012, kEach = 0.1;
  return (t.per_pixel ? 1.0 : static_cast<double>(t.height) * static_cast<double>(t.width)) * kMultiplyAdd + kEach;
}

double numbers_of(const TaskRow& t) {
  double numbers = 1;
  for (const int64_t size : result_shape(t)) numbers *= static_cast<double>(size);
  return numbers;
}

class Units {
 public:
  Units(const WeightKernels& kernels, int64_t images) : kernels_(kernels), images_(static_cast<double>(images)) {}
  std::vector<WeightUnit> units;

  // Units of a cost of at most about `limit`.
  void add(const TaskRow& t, double limit) {
    if (t.kind != WeightKind::convolution) return add_sum(t, limit);
    const bool exchanged = waste(t.out) * t.inner < waste(t.inner) * t.out;
    const int64_t narrow = exchanged ? t.inner : t.out, wide = exchanged ? t.out : t.inner, taps = t.kernel_y * t.kernel_x;
    const int64_t vectors = parts_of(wide, kernels_.vector), wides = parts_of(vectors, kernels_.widest / kernels_.vector);
    const double each = images_ * cost_of(t) * static_cast<double>(kernels_.widest);
    const int64_t numbers = std::clamp(static_cast<int64_t>(std::min(limit / each, 1e6)), int64_t{6}, kUnitNumbers);
    const int64_t narrows = parts_of(narrow, std::clamp(numbers / taps / 6 * 6, int64_t{6}, kMostNarrow));
    const int64_t in_unit = parts_of(narrow, narrows);
    const int64_t groups = parts_of(taps, std::max<int64_t>(1, numbers / in_unit));
    for (int64_t w = 0; w < wides; ++w)
      for (int64_t b = 0; b < narrows; ++b)
        for (int64_t g = 0; g < groups; ++g) {
          WeightUnit u{};
          u.task = &t, u.exchanged = exchanged;
          u.tap = taps * g / groups, u.taps = taps * (g + 1) / groups - u.tap;
          u.narrow = narrow * b / narrows, u.narrows = narrow * (b + 1) / narrows - u.narrow;
          u.wide = vectors * w / wides * kernels_.vector;
          u.wides = std::min(wide, vectors * (w + 1) / wides * kernels_.vector) - u.wide;
          u.cost = images_ * cost_of(t) * static_cast<double>(u.taps * u.narrows * waste(u.wides));
          units.push_back(u);
        }
  }

 private:
  const WeightKernels& kernels_;
  double images_;

  // Channels with the empty ends of vectors.
  int64_t waste(int64_t channels) const { return parts_of(channels, kernels_.vector) * kernels_.vector; }

  void add_sum(const TaskRow& t, double limit) {
    const int64_t rows = t.per_pixel ? t.height : 1;
    const double each = images_ * cost_of(t) * (t.per_pixel ? static_cast<double>(t.width * t.out) : 1.0);
    const auto most = static_cast<int64_t>(std::clamp(limit / each, 1.0, 1e9));
    const int64_t channels = t.per_pixel ? t.out : std::max(kernels_.widest, most / kernels_.widest * kernels_.widest);
    for (int64_t row = 0; row < rows; row += t.per_pixel ? most : 1)
      for (int64_t c = 0; c < t.out; c += channels) {
        WeightUnit u{};
        u.task = &t, u.exchanged = true;
        u.wide = c, u.wides = std::min(channels, t.out - c);
        u.row = row, u.rows = t.per_pixel ? std::min(most, rows - row) : 0;
        u.cost = each * static_cast<double>(t.per_pixel ? u.rows : u.wides);
        units.push_back(u);
      }
  }
};

// Memory that a thread keeps: at most about a megabyte.
float* memory_of_thread(int64_t floats) {
  struct Freed {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Freed> kept;
  thread_local int64_t size = 0;
  if (size < floats) {
    kept.reset();
    size = 0;
    void* found = nullptr;
    STD_TORCH_CHECK(posix_memalign(&found, 64, floats * sizeof(float)) == 0, "there is no memory for ", floats, " numbers");
    kept.reset(static_cast<float*>(found));
    size = floats;
  }
  return kept.get();
}

}  // namespace

void weight_gradients(Tensor factors, std::vector<Tensor> results, Tensor code, Tensor tasks, Tensor workspace) {
  const std::shared_ptr<const CheckedProgram> program = checked_program(code);
  const ProgramHeader& header = *program->header;
  check_contiguous("factors", factors, ScalarType::Float);
  STD_TORCH_CHECK(factors.dim() == 1, "factors must be a vector");
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.dim() == 1 && workspace.is_contiguous() &&
                      workspace.numel() >= program->workspace,
                  "the workspace must be contiguous bytes, ", program->workspace, " or more, got ", workspace.numel());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % 64 == 0 &&
                      (workspace.const_data_ptr() != nullptr || program->workspace == 0),
                  "the workspace must begin at a multiple of 64");
  STD_TORCH_CHECK(header.workers == 1 || header.slot % 64 == 0, "slots must begin at multiples of 64 bytes, got slots of ",
                  header.slot);
  STD_TORCH_CHECK((factors.numel() + header.chunk - 1) / header.chunk <= header.workers, "a workspace of this program holds ",
                  header.chunk * header.workers, " images, got factors of ", factors.numel());
  check_results(results, factors, workspace);
  const std::vector<TaskRow> rows = checked_tasks(*program, tasks, results);

  std::vector<float*> places;
  for (const Tensor& result : results) places.push_back(static_cast<float*>(result.mutable_data_ptr()));
  const WeightJob job{program->header,
                      program->buffers,
                      static_cast<const char*>(workspace.const_data_ptr()),
                      static_cast<const float*>(factors.const_data_ptr()),
                      places.data(),
                      factors.numel()};
  if (job.images == 0 || rows.empty()) return;
  double cost = 0;
  for (const TaskRow& t : rows) cost += static_cast<double>(job.images) * cost_of(t) * numbers_of(t);
  const int64_t threads = cost < kAloneNanoseconds ? 1 : std::max<int64_t>(1, torch::stable::get_num_threads());
  const WeightKernels kernels = chosen_kernels();
  Units made(kernels, job.images);
  for (const TaskRow& t : rows) made.add(t, threads == 1 ? 1e300 : cost / static_cast<double>(kUnitsOfThread * threads));
  auto& units = made.units;
  if (threads > 1)
    std::stable_sort(units.begin(), units.end(), [](const WeightUnit& a, const WeightUnit& b) { return a.cost > b.cost; });
  int64_t memory = 0;
  for (const WeightUnit& unit : units) memory = std::max(memory, kernels.memory(job, unit));
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t behind) {
    if (first == behind) return;
    float* own = memory_of_thread(memory);
    for (size_t k; (k = next.fetch_add(1)) < units.size();) kernels.run(job, units[k], own);
  });
}

}  // namespace fastebm

STABLE_TORCH_LIBRARY_IMPL(fastebm_cpp, CPU, library) {
  library.impl("weight_gradients", TORCH_BOX(&fastebm::weight_gradients));
}
