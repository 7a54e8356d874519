// The rules of a planned program, as fastebm/ops/program_check.py says them and in the same order.
#include "program_check.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace fastebm {
namespace {

// Products of a few numbers below the limits: no sum or product of those here leaves it.
using Wide = __int128;

constexpr int64_t kLimit = int64_t{1} << 31, kMemoryLimit = int64_t{1} << 47, kLine = 64, kSoftmaxChannels = 1024,
                  kMostConstants = 1 << 20;
constexpr int64_t kActivations = static_cast<int64_t>(Activation::reciprocal) + 1;

// start, step and count along channels, rows and columns.
struct Axis {
  int64_t start, step, count;
  bool operator==(const Axis& o) const { return start == o.start && step == o.step && count == o.count; }
};
struct Box {
  Axis axes[3];
  bool operator==(const Box& o) const { return axes[0] == o.axes[0] && axes[1] == o.axes[1] && axes[2] == o.axes[2]; }
};

bool disjoint(const Box& one, const Box& other) {
  for (int k = 0; k < 3; ++k) {
    const Axis &a = one.axes[k], &b = other.axes[k];
    if (Wide(a.start) + Wide(a.step) * (a.count - 1) < b.start || Wide(b.start) + Wide(b.step) * (b.count - 1) < a.start)
      return true;
    if (a.step == b.step && (a.start - b.start) % a.step != 0) return true;
  }
  return false;
}

// Which part of an image was written, as boxes of a grid. Boxes that overlap others count only where one is whole.
struct Coverage {
  Wide total = 0, covered = 0;
  std::vector<Box> boxes;

  Coverage() = default;
  Coverage(int64_t channels, int64_t height, int64_t width) : total(Wide(channels) * height * width) {}
  bool whole() const { return covered == total; }
  void clear() { boxes.clear(), covered = 0; }
  void add(const Box& box) {
    const Wide size = Wide(box.axes[0].count) * box.axes[1].count * box.axes[2].count;
    if (size == total) {
      boxes = {box}, covered = size;
      return;
    }
    for (const Box& other : boxes)
      if (box == other || !disjoint(box, other)) return;
    boxes.push_back(box);
    covered += size;
  }
};

struct Extent {
  Wide begin, end;
};

Extent extent_of(const BufferRow& b) {
  const Wide numbers =
      b.image_stride < b.pixel_stride ? Wide(b.height) * b.row_stride : Wide(b.images) * b.image_stride;
  return {b.offset, b.offset + numbers * b.bytes};
}

bool is_write(const EpilogueRow& step) { return step.op == EpilogueOp::store || step.op == EpilogueOp::activate_keeping; }

// Pixels beside the rows of b that are multiplied for results that count, and the byte of the slot behind the last one that a
// tile may touch: fastebm/ops/tiles.py says why.
struct TileWindow {
  int64_t left;
  Wide right;
};
TileWindow tile_window(const InstructionRow& i, const BufferRow& b) {
  const Wide columns = b.pixel_stride == kDense ? 7 : Wide(i.kernel_x - 1) * i.dilation_x;
  return {std::max<int64_t>(0, i.pad_x),
          std::max<Wide>(0, Wide(i.width - 1) * i.stride_x + columns - i.pad_x - (b.width - 1))};
}
Wide tile_reach(const InstructionRow& i, const BufferRow& b, int64_t images) {
  const bool dense = b.pixel_stride == kDense;
  const Wide tap = dense ? 0 : Wide(i.kernel_x - 1) * i.dilation_x;
  const int64_t inputs = dense ? 1 : (i.source_channels + 31) / 32;
  const Wide column = Wide(i.width - 1) * i.stride_x - i.pad_x + tap;
  const Wide row_end = (Wide((i.width + 15) / 16) * 16 - 1) * i.stride_x - i.pad_x + tap;
  const Wide last = std::max<Wide>(
      Wide(images - 1) * b.image_stride + (b.margin + row_end) * b.pixel_stride,
      (Wide((images + 15) / 16) * 16 - 1) * b.image_stride + (b.margin + std::max<Wide>(column, b.width - 1)) * b.pixel_stride);
  return b.offset + (last + Wide(b.height - 1) * b.row_stride + i.source_channel + 32 * inputs) * b.bytes;
}

class Check {
 public:
  explicit Check(CheckedProgram& program) : p_(program) {}

  void run() {
    tables();
    const ProgramHeader& h = *p_.header;
    at_ = "the header";
    within("layout", static_cast<int64_t>(h.layout), 0, 4);
    within("panel", h.panel, 0);
    within("chunk", h.chunk, 1);
    within("slot", h.slot, 0, kMemoryLimit);
    within("workers", h.workers, 1);
    within("team", h.team, 0, 2);
    unless(h.bytes != 8, "float64 programs run in the reference only");
    unless(h.bytes == 2 || h.bytes == 4, "bytes must be 2, 4 or 8");
    unless(h.layout != Layout::panels || h.panel == 16 || h.panel == 32, "a panel has 16 or 32 outputs");
    unless(h.layout != Layout::tiles || h.bytes == 2, "tiles are of 2 bytes");
    unless(h.layout != Layout::pairs || (h.bytes == 2 && h.panel == 32), "pairs are of 2 bytes, in panels of 32 outputs");
    const Wide workspace = Wide(h.slot) * h.workers;
    unless(workspace < kMemoryLimit, "the slots are beyond all memory");
    p_.workspace = static_cast<int64_t>(workspace);
    used_.resize(h.buffers, false), coverage_.resize(h.buffers), segment_of_.resize(h.buffers, -1), dead_.resize(h.buffers, false);
    int64_t expected = 0;
    for (int64_t s = 0; s < h.segments; ++s) {
      const SegmentRow& segment = p_.segments[s];
      at_ = "segment", number_ = s;
      within("images", segment.images, 1, h.chunk + 1);
      within("count", segment.count, 0);
      unless(segment.first == expected, "segments must follow one another");
      unless(h.layout != Layout::plain || segment.images == h.chunk, "plain programs go in one piece");
      expected += segment.count;
    }
    unless(expected == h.instructions, "segments must cover all instructions");
    for (int64_t s = 0; s < h.segments; ++s) segment(s);
    p_.whole_gradient = p_.writes_gradient && gradient_.whole();
    p_.kept.assign(h.buffers, false);
    for (int64_t b : in_use_) p_.kept[b] = coverage_[b].whole() && p_.buffers[b].images >= h.chunk;
  }

 private:
  CheckedProgram& p_;
  const char* at_ = "the code";
  int64_t number_ = -1;
  std::vector<char> used_, dead_;
  std::vector<Coverage> coverage_;
  std::vector<int64_t> segment_of_;
  std::vector<int64_t> in_use_;  // the buffers of used_
  Coverage gradient_;
  std::vector<const EpilogueRow*> writes_;  // of the instruction at hand

  template <class... Rest>
  void unless(bool holds, const Rest&... rule) const {
    if (holds) return;
    const std::string place = number_ < 0 ? std::string(at_) : std::string(at_) + " " + std::to_string(number_);
    STD_TORCH_CHECK(false, "code is not a program that can run: ", place, ": ", rule...);
  }

  void within(const char* name, int64_t number, int64_t low, int64_t high = kLimit) const {
    unless(low <= number && number < high, name, " must be in [", low, ", ", high, "), got ", number);
  }

  // ---- the tables, one behind the other

  void tables() {
    const auto count = static_cast<int64_t>(p_.code.size());
    constexpr int64_t kHeader = sizeof(ProgramHeader) / sizeof(int64_t);
    STD_TORCH_CHECK(count >= kHeader && p_.code[0] == 1, "code does not begin as a program does");
    p_.header = reinterpret_cast<const ProgramHeader*>(p_.code.data());
    const ProgramHeader& h = *p_.header;
    int64_t at = kHeader;
    const auto table = [&]<class Row>(const Row*& rows, int64_t number) {
      constexpr int64_t kWidth = sizeof(Row) / sizeof(int64_t);
      STD_TORCH_CHECK(number >= 0 && number <= (count - at) / kWidth, "code has ", count,
                      " numbers, fewer than its header says");
      rows = reinterpret_cast<const Row*>(p_.code.data() + at);
      at += number * kWidth;
    };
    table(p_.buffers, h.buffers);
    table(p_.instructions, h.instructions);
    table(p_.epilogues, h.epilogues);
    table(p_.segments, h.segments);
    STD_TORCH_CHECK(at == count, "code has ", count, " numbers, its header says ", at);
  }

  // ---- buffers

  const BufferRow& buffer(int64_t number) {
    within("a buffer's number", number, 0, p_.header->buffers);
    const BufferRow& b = p_.buffers[number];
    if (used_[number]) return b;
    const char* at = at_;
    const int64_t before = number_;
    at_ = "buffer", number_ = number;
    const ProgramHeader& h = *p_.header;
    within("channels", b.channels, 1);
    within("height", b.height, 1);
    within("width", b.width, 1);
    within("images", b.images, 1);
    within("pixel_stride", b.pixel_stride, 1);
    within("margin", b.margin, 0);
    within("row_stride", b.row_stride, 1, kMemoryLimit);
    within("image_stride", b.image_stride, 1, kMemoryLimit);
    within("offset", b.offset, 0, kMemoryLimit);
    unless(b.offset % kLine == 0, "the offset must be a multiple of ", kLine, ", got ", b.offset);
    unless(b.bytes == h.bytes, "a number has ", h.bytes, " bytes in this program, got ", b.bytes);
    const Wide row = (2 * Wide(b.margin) + b.width) * b.pixel_stride;
    bool fits;
    if (b.image_stride < b.pixel_stride) {  // images lie pixel by pixel beside each other
      unless(h.layout != Layout::plain, "images beside each other are not for plain weights");
      fits = b.channels <= b.image_stride && Wide(b.images) * b.image_stride <= b.pixel_stride && row == b.row_stride;
    } else {
      fits = b.channels <= b.pixel_stride && row <= b.row_stride && Wide(b.height) * b.row_stride <= b.image_stride;
    }
    unless(fits, "pixels, rows or images overlap");
    unless(b.row_stride % b.pixel_stride == 0, "a row must be a number of pixels");
    unless(extent_of(b).end <= h.slot, "it lies beyond the slot of ", h.slot, " bytes");
    used_[number] = true;
    in_use_.push_back(number);
    coverage_[number] = Coverage(b.channels, b.height, b.width);
    at_ = at, number_ = before;
    return b;
  }

  bool overlap(int64_t one, int64_t other) const {
    const Extent a = extent_of(p_.buffers[one]), b = extent_of(p_.buffers[other]);
    return a.begin < b.end && b.begin < a.end;
  }

  const BufferRow& use(int64_t number, int64_t segment, int64_t images) {
    const BufferRow& b = buffer(number);
    if (b.images < p_.header->chunk) {
      unless(b.images >= images, "buffer ", number, " has room for ", b.images, " images of ", images);
      if (segment_of_[number] < 0) segment_of_[number] = segment;
      unless(segment_of_[number] == segment, "buffer ", number, " is of another segment");
    }
    return b;
  }

  // ---- segments and instructions

  void collect_writes(int64_t number) {
    at_ = "instruction", number_ = number;
    const InstructionRow& i = p_.instructions[number];
    within("first", i.first, 0, p_.header->epilogues + 1);
    within("count", i.count, 0, p_.header->epilogues - i.first + 1);
    writes_.clear();
    for (int64_t k = 0; k < i.count; ++k) {
      const EpilogueRow& step = p_.epilogues[i.first + k];
      if (!is_write(step)) continue;
      buffer(step.buffer);
      writes_.push_back(&step);
    }
  }

  // Where a segment is run more than once for a chunk, nothing that outlives a run may lie where it writes.
  void segment(int64_t number) {
    const SegmentRow& s = p_.segments[number];
    std::fill(dead_.begin(), dead_.end(), false);
    std::set<int64_t> written;
    for (int64_t k = s.first; k < s.first + s.count; ++k) {
      collect_writes(k);
      for (const EpilogueRow* step : writes_) written.insert(step->buffer);
    }
    if (s.images < p_.header->chunk)
      for (int64_t b : in_use_)
        if (p_.buffers[b].images >= p_.header->chunk)
          for (int64_t w : written)
            if (w != b && overlap(b, w)) dead_[b] = true, coverage_[b].clear();
    for (int64_t k = s.first; k < s.first + s.count; ++k) {
      collect_writes(k);
      instruction(p_.instructions[k], number, s.images);
    }
  }

  void instruction(const InstructionRow& i, int64_t segment, int64_t images) {
    within("channels", i.channels, 1);
    within("height", i.height, 1);
    within("width", i.width, 1);
    within("step_y", i.step_y, 1);
    within("step_x", i.step_x, 1);
    within("kernel_y", i.kernel_y, 1);
    within("kernel_x", i.kernel_x, 1);
    within("stride_y", i.stride_y, 1);
    within("stride_x", i.stride_x, 1);
    within("start_y", i.start_y, 0);
    within("start_x", i.start_x, 0);
    within("source_channel", i.source_channel, 0);
    within("source_channels", i.source_channels, 0);
    within("dilation_y", i.dilation_y, 1);
    within("dilation_x", i.dilation_x, 1);
    within("pad_y", i.pad_y, 1 - kLimit);
    within("pad_x", i.pad_x, 1 - kLimit);
    within("constant", i.constant, 1 - kLimit);
    within("kind", static_cast<int64_t>(i.kind), 0, static_cast<int64_t>(Kind::first_maximum) + 1);
    within("broadcast", i.broadcast, 0, 2);
    const Wide size = Wide(i.channels) * i.height * i.width;
    bool bounded = size <= (Wide(1) << 20) + 4 * Wide(p_.header->slot);
    for (int64_t k = 0; k < i.count; ++k) bounded |= p_.epilogues[i.first + k].op == EpilogueOp::store_gradient;
    unless(bounded, "its grid is out of proportion to a slot of ", p_.header->slot, " bytes");
    if (i.kind == Kind::load) load(i);
    else source(i, use(i.source, segment, images), images);
    std::vector<std::pair<int64_t, int64_t>> own;  // what this epilogue has written: buffer, channel
    for (int64_t k = 0; k < i.count; ++k) step(i, p_.epilogues[i.first + k], segment, images, own);
    for (const EpilogueRow* step : writes_) {
      for (int64_t other : in_use_)
        if (other != step->buffer && overlap(other, step->buffer)) coverage_[other].clear();
      if (!dead_[step->buffer]) coverage_[step->buffer].add(box_of(i, step->channel));
    }
  }

  static Box box_of(const InstructionRow& i, int64_t channel) {
    return {{{channel, 1, i.channels}, {i.start_y, i.step_y, i.height}, {i.start_x, i.step_x, i.width}}};
  }

  void load(const InstructionRow& i) {
    unless(i.source == -1, "LOAD has no source");
    if (i.source_channels == 0) return;
    unless(i.channels == i.source_channels + (i.constant > 0), "LOAD has the sample's channels, and one of ones");
    const Sample sample{i.source_channels, i.height, i.width};
    unless(!p_.loads || p_.sample == sample, "all samples have one shape");
    p_.loads = true, p_.sample = sample;
  }

  void source(const InstructionRow& i, const BufferRow& b, int64_t images) {
    within("source_channels", i.source_channels, 1);
    unless(i.source_channel + i.source_channels <= b.channels, "it reads channels to ", i.source_channel + i.source_channels, " of ",
           b.channels, " in buffer ", i.source);
    unless(coverage_[i.source].whole(), "it reads buffer ", i.source, " before all of it is written");
    for (const EpilogueRow* step : writes_)
      unless(step->buffer != i.source && !overlap(step->buffer, i.source), "it writes where it reads, buffer ", i.source);
    if (i.kind == Kind::gather) {
      unless(i.source_channels == (i.broadcast ? 1 : i.channels), "GATHER reads ", i.broadcast ? 1 : i.channels, " channels");
      p_.numbers = std::max(p_.numbers, i.constant + 1);
    } else if (i.kind == Kind::convolution) {
      border(i, b, Wide(i.kernel_y) * i.kernel_x * i.source_channels * i.channels);
      weight(i, b, images);
    } else if (i.kind == Kind::pool) {
      unless(i.source_channels == i.channels, "POOL keeps channels");
      unless(i.dilation_y == 1 && i.dilation_x == 1, "POOL has no dilation");
      border(i, b, 0);
    } else if (i.kind == Kind::first_maximum) {
      unless(i.channels == i.source_channels && i.height == b.height && i.width == b.width, "FIRST_MAXIMUM keeps shapes");
    } else {
      unless(i.channels == (i.kind == Kind::softmax ? i.source_channels : 1), "a softmax has another number of channels");
      unless(i.source_channels <= kSoftmaxChannels, "a softmax has ", kSoftmaxChannels, " channels at most");
      unless(i.height == b.height && i.width == b.width, "a softmax keeps pixels");
    }
  }

  void border(const InstructionRow& i, const BufferRow& b, Wide weights) {
    const auto along = [](Wide n, Wide size, Wide s, Wide k, Wide d, Wide p) {
      return std::max<Wide>(size, (n - 1) * s + (k - 1) * d + 1 - p) + std::max<Wide>(0, p);
    };
    const Wide rows = along(i.height, b.height, i.stride_y, i.kernel_y, i.dilation_y, i.pad_y),
               columns = along(i.width, b.width, i.stride_x, i.kernel_x, i.dilation_x, i.pad_x);
    const Wide most = (Wide(1) << 20) + 64 * Wide(p_.header->slot) + 4 * weights;
    unless(rows <= most / i.source_channels / columns, "its windows reach over a border out of proportion to what there is");
  }

  void weight(const InstructionRow& i, const BufferRow& b, int64_t images) {
    within("constant", i.constant, 1, kMostConstants);
    const ProgramHeader& h = *p_.header;
    const Wide taps = Wide(i.kernel_y) * i.kernel_x;
    unless(taps < kMemoryLimit, "a kernel of so many taps is beyond all memory");
    std::vector<int64_t> sizes;
    if (h.layout == Layout::plain) {
      sizes = {static_cast<int64_t>(taps), i.source_channels, i.channels};
    } else if (h.layout == Layout::panels) {
      sizes = {(i.channels + h.panel - 1) / h.panel, static_cast<int64_t>(taps), i.source_channels, h.panel};
    } else if (h.layout == Layout::pairs) {
      sizes = {(i.channels + h.panel - 1) / h.panel, taps_are_outputs(i) ? 1 : static_cast<int64_t>(taps),
               (i.source_channels + 1) / 2, h.panel, 2};
    } else {
      const bool dense = b.pixel_stride == kDense;
      unless(!dense || (i.kernel_x <= 32 / kDense && i.dilation_x == 1 && i.source_channel == 0),
             "rows of a kernel over few channels have 8 pixels at most");
      const int64_t tiles = i.channels <= 16 ? 1 : 2;
      const Wide steps = dense ? Wide(i.kernel_y) : taps * ((i.source_channels + 31) / 32);
      unless(steps < kMemoryLimit, "a kernel of so many taps is beyond all memory");
      sizes = {(i.channels + 16 * tiles - 1) / (16 * tiles), static_cast<int64_t>(steps), tiles, 16, 16, 2};
      const TileWindow window = tile_window(i, b);
      unless(window.left <= b.margin && window.right <= b.row_stride / b.pixel_stride - b.margin - b.width,
             "windows see more pixels beside buffer ", i.source, " than it has");
      unless(tile_reach(i, b, images) <= h.slot, "tiles reach beyond the slot of ", h.slot, " bytes");
    }
    ConstantNeed& need = constant(i.constant);
    unless(need.uses == ConstantNeed::none || (need.uses == ConstantNeed::weight && need.sizes == sizes),
           need.uses == ConstantNeed::image ? "a constant is a weight or an image" : "a constant has one shape");
    need.uses = ConstantNeed::weight, need.sizes = sizes;
  }

  ConstantNeed& constant(int64_t number) {
    if (static_cast<int64_t>(p_.constants.size()) <= number) p_.constants.resize(number + 1);
    return p_.constants[number];
  }

  // ---- epilogues

  void step(const InstructionRow& i, const EpilogueRow& step, int64_t segment, int64_t images,
            std::vector<std::pair<int64_t, int64_t>>& own) {
    within("an operation's number", static_cast<int64_t>(step.op), 0, static_cast<int64_t>(EpilogueOp::store_energies) + 1);
    within("number", step.number, -1);
    const Wide rows = i.start_y + Wide(i.step_y) * (i.height - 1), columns = i.start_x + Wide(i.step_x) * (i.width - 1);
    switch (step.op) {
      case EpilogueOp::add_constant:
      case EpilogueOp::multiply_constant: return constant_image(i, step, rows, columns);
      case EpilogueOp::store_energies:
        unless(i.channels == 1 && i.height == 1 && i.width == 1, "an energy is one number");
        p_.writes_energies = true;
        return;
      case EpilogueOp::store_gradient: return store_gradient(i, rows, columns);
      case EpilogueOp::scale: within("a factor's number", step.number, 0); break;
      default: break;
    }
    const bool slope = step.op == EpilogueOp::slope,
               activates = slope || step.op == EpilogueOp::activate || step.op == EpilogueOp::activate_keeping;
    if (step.number >= 0) p_.numbers = std::max(p_.numbers, step.number + (activates ? 3 : 1));
    if (activates) {
      within("activation", static_cast<int64_t>(step.activation), 0, kActivations);
      unless(step.number >= 0 || !has_parameters(step.activation), "this activation has parameters");
    }
    if (slope) {
      within("of_result", step.of_result, 0, 2);
      unless(step.of_result == 0 || differentiable_by_result(step.activation), "no derivative by its result");
    }
    const bool reads = slope || step.op == EpilogueOp::add || step.op == EpilogueOp::multiply;
    if (reads || is_write(step)) operand(i, step, use(step.buffer, segment, images), rows, columns, own);
  }

  static bool has_parameters(Activation kind) {
    return kind == Activation::elu || kind == Activation::leaky_relu || kind == Activation::softplus ||
           kind == Activation::hardtanh;
  }
  static bool differentiable_by_result(Activation kind) {
    switch (kind) {
      case Activation::elu:
      case Activation::leaky_relu:
      case Activation::relu:
      case Activation::tanh:
      case Activation::sigmoid:
      case Activation::exp:
      case Activation::hardtanh:
      case Activation::sqrt:
      case Activation::rsqrt:
      case Activation::reciprocal: return true;
      default: return false;
    }
  }

  void constant_image(const InstructionRow& i, const EpilogueRow& step, Wide rows, Wide columns) {
    within("a constant's number", step.number, 1, kMostConstants);
    unless(rows < kMemoryLimit && columns < kMemoryLimit, "an image of so many pixels is beyond all memory");
    ConstantNeed& need = constant(step.number);
    unless(need.uses != ConstantNeed::weight, "a constant is a weight or an image");
    if (need.uses == ConstantNeed::none) need.sizes = {1, 1, 1};
    need.uses = ConstantNeed::image;
    const int64_t least[3] = {i.channels, static_cast<int64_t>(rows) + 1, static_cast<int64_t>(columns) + 1};
    for (int k = 0; k < 3; ++k) need.sizes[k] = std::max(need.sizes[k], least[k]);
  }

  void store_gradient(const InstructionRow& i, Wide rows, Wide columns) {
    unless(rows < kMemoryLimit && columns < kMemoryLimit, "a gradient of so many pixels is beyond all memory");
    Sample& least = p_.gradient;
    unless(!p_.writes_gradient || least.channels == i.channels, "a gradient has all channels of a sample");
    least = {i.channels, std::max(least.height, static_cast<int64_t>(rows) + 1),
             std::max(least.width, static_cast<int64_t>(columns) + 1)};
    p_.writes_gradient = true;
    Coverage renewed(least.channels, least.height, least.width);
    for (const Box& box : gradient_.boxes) renewed.add(box);
    renewed.add(box_of(i, 0));
    gradient_ = renewed;
  }

  // Reads and writes of a buffer at the grid's places.
  void operand(const InstructionRow& i, const EpilogueRow& step, const BufferRow& b, Wide rows, Wide columns,
               std::vector<std::pair<int64_t, int64_t>>& own) {
    within("factor_y", step.factor_y, 1);
    within("factor_x", step.factor_x, 1);
    within("channel", step.channel, 0);
    within("broadcast", step.broadcast, 0, 2);
    const int64_t behind = step.channel + (step.broadcast ? 1 : i.channels);
    unless(behind <= b.channels, "channels to ", behind, " of ", b.channels, " in buffer ", step.buffer);
    unless(rows / step.factor_y < b.height && columns / step.factor_x < b.width, "its pixels are beyond buffer ", step.buffer,
           " of ", b.height, "x", b.width, " pixels");
    const bool straight = step.factor_y == 1 && step.factor_x == 1 && !step.broadcast;
    if (is_write(step)) {
      unless(straight, "what is written has each pixel and channel");
      for (const EpilogueRow* other : writes_) {
        const int64_t distance = other->channel > step.channel ? other->channel - step.channel : step.channel - other->channel;
        const bool clash = other->buffer == step.buffer ? distance != 0 && distance < i.channels
                                                        : overlap(other->buffer, step.buffer);
        unless(!clash, "two operations write to one place, in buffer ", step.buffer);
      }
      own.emplace_back(step.buffer, step.channel);
      return;
    }
    if (straight)
      for (const auto& [number, channel] : own)
        if (number == step.buffer) {
          if (channel == step.channel) return;
          break;
        }
    unless(coverage_[step.buffer].whole(), "it reads buffer ", step.buffer, " before all of it is written");
    for (const EpilogueRow* other : writes_) {
      const bool same = other->buffer == step.buffer && straight && other->channel == step.channel;
      unless(same || !(other->buffer == step.buffer || overlap(other->buffer, step.buffer)), "it writes where it reads, buffer ",
             step.buffer);
    }
  }
};

bool same_code(const CheckedProgram& program, const int64_t* code, int64_t count) {
  return static_cast<int64_t>(program.code.size()) == count &&
         std::memcmp(program.code.data(), code, count * sizeof(int64_t)) == 0;
}

}  // namespace

std::shared_ptr<const CheckedProgram> checked_program(const int64_t* code, int64_t count) {
  // A thread mostly runs the program that it ran before. The programs of all threads are kept, the last used in front.
  thread_local std::shared_ptr<const CheckedProgram> mine;
  if (mine && same_code(*mine, code, count)) return mine;
  constexpr size_t kKept = 64;
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const CheckedProgram>> kept;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (same_code(**it, code, count)) {
        std::rotate(kept.begin(), it, it + 1);
        return mine = kept.front();
      }
  }
  auto program = std::make_shared<CheckedProgram>();
  program->code.assign(code, code + count);
  Check(*program).run();
  const std::lock_guard<std::mutex> lock(mutex);
  kept.insert(kept.begin(), program);
  if (kept.size() > kKept) kept.pop_back();
  return mine = program;
}

std::shared_ptr<const CheckedProgram> checked_program(const torch::stable::Tensor& code) {
  STD_TORCH_CHECK(code.scalar_type() == torch::headeronly::ScalarType::Long && code.dim() == 1 && code.is_contiguous(),
                  "code must be a contiguous int64 vector on the CPU");
  STD_TORCH_CHECK(code.const_data_ptr() != nullptr, "code does not begin as a program does");
  return checked_program(static_cast<const int64_t*>(code.const_data_ptr()), code.numel());
}

}  // namespace fastebm
