// The rules of lane programs: what is read was written before, and every address lies in the arena, the tables or the constants.
#include "lanes_check.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <mutex>

namespace fastebm {
namespace {

constexpr int64_t kMost = int64_t{1} << 28;  // numbers of an arena, an index space, a table or the constants

int operands_of(LaneOp op) {
  switch (op) {
    case LaneOp::multiply_add:
    case LaneOp::select: return 3;
    case LaneOp::add:
    case LaneOp::subtract:
    case LaneOp::multiply:
    case LaneOp::divide:
    case LaneOp::atan2:
    case LaneOp::power:
    case LaneOp::minimum:
    case LaneOp::maximum:
    case LaneOp::less:
    case LaneOp::less_equal:
    case LaneOp::equal:
    case LaneOp::not_equal:
    case LaneOp::greater:
    case LaneOp::greater_equal:
    case LaneOp::logical_and:
    case LaneOp::logical_or:
    case LaneOp::remainder: return 2;
    default: return 1;
  }
}

// Nanoseconds of an operation on one number, as measured with AVX-512 at 4 GHz.
double cost_of(LaneOp op) {
  switch (op) {
    case LaneOp::square_root:
    case LaneOp::reciprocal_root: return 0.1;
    case LaneOp::exp:
    case LaneOp::log:
    case LaneOp::tanh: return 0.2;
    case LaneOp::expm1:
    case LaneOp::log1p:
    case LaneOp::sigmoid:
    case LaneOp::silu:
    case LaneOp::atan: return 0.3;
    case LaneOp::sin:
    case LaneOp::cos: return 0.4;
    case LaneOp::erf:
    case LaneOp::atan2: return 0.6;
    case LaneOp::softplus:
    case LaneOp::power:
    case LaneOp::power_number: return 1;
    case LaneOp::remainder: return 2;
    default: return 0.03;
  }
}

double cost_of(const LaneProgram& program) {
  constexpr double kMove = 0.03, kMultiplyAdd = 0.01, kPairMultiplyAdd = 0.03, kUpdate = 0.7;
  double cost = kUpdate * static_cast<double>(program.header->sample);
  for (int64_t n = 0; n < program.header->instructions; ++n) {
    const LaneInstruction& i = program.instructions[n];
    const auto product = static_cast<double>(i.rows) * static_cast<double>(i.columns) * static_cast<double>(i.depth);
    if (i.kind == LaneKind::product) cost += kMultiplyAdd * product;
    if (i.kind == LaneKind::pair_product) cost += kPairMultiplyAdd * product * static_cast<double>(i.batch);
    if (i.kind != LaneKind::map && i.kind != LaneKind::scan) continue;
    double each = kMove * static_cast<double>(i.operands + i.outputs + 1);
    if (i.kind == LaneKind::map)
      for (int64_t m = 0; m < i.micros; ++m) each += cost_of(program.micros[i.first_micro + m].op);
    cost += each * static_cast<double>(i.outer * i.inner);
  }
  return cost;
}

class Check {
 public:
  explicit Check(CheckedLanes& checked) : checked_(checked), program_(checked.program) {}

  void run() {
    decode();
    const LaneHeader& h = *program_.header;
    written_.assign(h.arena, false);
    std::fill(written_.begin(), written_.begin() + h.sample + h.conditions, true);
    for (int64_t i = 0; i < h.instructions; ++i) instruction(program_.instructions[i]);
    STD_TORCH_CHECK(in(h.energy, 1, h.arena) && in(h.gradient, h.sample, h.arena), "the energy or the gradient lies outside of the arena");
    read(h.energy, "the energy");
    for (int64_t e = 0; e < h.sample; ++e) read(h.gradient + e, "the gradient");
  }

 private:
  static bool in(int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
  }

  template <class Row>
  const Row* rows(int64_t& at, int64_t count) {
    constexpr int64_t kNumbers = sizeof(Row) / sizeof(int64_t);
    const int64_t left = static_cast<int64_t>(checked_.code.size()) - at;
    STD_TORCH_CHECK(count >= 0 && count <= left / kNumbers, "code has another length than its header says");
    const auto* first = reinterpret_cast<const Row*>(checked_.code.data() + at);
    at += count * kNumbers;
    return first;
  }

  void decode() {
    int64_t at = 0;
    program_.header = rows<LaneHeader>(at, 1);
    const LaneHeader& h = *program_.header;
    STD_TORCH_CHECK(h.version == 1, "code does not begin as a lane program does");
    program_.instructions = rows<LaneInstruction>(at, h.instructions);
    program_.operands = rows<LaneOperand>(at, h.operands);
    program_.micros = rows<LaneMicro>(at, h.micros);
    program_.outputs = rows<LaneOutputRow>(at, h.outputs);
    STD_TORCH_CHECK(at == static_cast<int64_t>(checked_.code.size()), "code has another length than its header says");
    STD_TORCH_CHECK(h.tables == static_cast<int64_t>(checked_.tables.size()), "the tables have another length than the code says");
    STD_TORCH_CHECK(h.sample >= 1 && h.conditions >= 0 && h.sample <= kMost && h.conditions <= kMost &&
                        h.sample + h.conditions <= h.arena && h.arena <= kMost && h.constants >= 0 && h.constants <= kMost,
                    "the sample, the arena or the constants have an impossible size");
    program_.tables = checked_.tables.data();
    checked_.direct.assign(h.micros, -1);
    program_.direct = checked_.direct.data();
  }

  void read(int64_t address, const char* what) const {
    STD_TORCH_CHECK(written_[address], what, " is read before it is written");
  }

  void count(int64_t value, int64_t least, const char* what) const {
    STD_TORCH_CHECK(value >= least && value <= kMost, what, " is ", value);
  }

  // The range of addresses base + table[0 ... entries - 1].
  struct Range {
    int64_t low, high;
  };
  Range range(int64_t base, int64_t table, int64_t entries) const {
    STD_TORCH_CHECK(base >= -kMost && base <= kMost, "an address is ", base);
    STD_TORCH_CHECK(table >= -1 && (table < 0 || in(table, entries, program_.header->tables)), "a table is outside of the tables");
    if (entries == 0) return {base, base};
    if (table < 0) return {base, base + entries - 1};
    const auto [low, high] = std::minmax_element(program_.tables + table, program_.tables + table + entries);
    return {base + *low, base + *high};
  }
  int64_t entry(int64_t table, int64_t i) const { return table < 0 ? i : program_.tables[table + i]; }

  void inside(const Range& r, int64_t size, const char* what) const {
    STD_TORCH_CHECK(r.low >= 0 && r.high < size, what, " lies outside of its memory");
  }

  void instruction(const LaneInstruction& i) {
    switch (i.kind) {
      case LaneKind::map: return map(i);
      case LaneKind::product: return product(i);
      case LaneKind::pair_product: return pair_product(i);
      case LaneKind::scan: return scan(i);
      default: STD_TORCH_CHECK(false, "there is no instruction of kind ", static_cast<int64_t>(i.kind));
    }
  }

  int64_t index_space(const LaneInstruction& i) const {
    count(i.outer, 1, "the number of rows");
    count(i.inner, 1, "the length of a row");
    STD_TORCH_CHECK(i.outer <= kMost / i.inner, "an index space is too large");
    return i.outer * i.inner;
  }

  void map(const LaneInstruction& i) {
    const LaneHeader& h = *program_.header;
    const int64_t total = index_space(i);
    STD_TORCH_CHECK(in(i.first_operand, i.operands, h.operands) && in(i.first_micro, i.micros, h.micros) &&
                        in(i.first_output, i.outputs, h.outputs),
                    "a loop's parts lie outside of the code");
    STD_TORCH_CHECK(i.operands >= 1 && i.operands < kMaxRegisters, "a loop reads ", i.operands, " operands");
    bool defined[kMaxRegisters] = {};
    for (int64_t k = 0; k < i.operands; ++k) {
      const LaneOperand& operand = program_.operands[i.first_operand + k];
      STD_TORCH_CHECK(operand.space >= LaneSpace::arena && operand.space <= LaneSpace::number, "an operand's space is unknown");
      const bool number = operand.space == LaneSpace::number;
      const Range r = range(operand.base, number ? -1 : operand.table, number ? 1 : total);
      inside(r, operand.space == LaneSpace::arena ? h.arena : h.constants, "an operand");
      if (operand.space == LaneSpace::arena)
        for (int64_t e = 0; e < total; ++e) read(operand.base + entry(operand.table, e), "an operand");
      defined[k] = true;
    }
    for (int64_t k = 0; k < i.micros; ++k) {
      const LaneMicro& m = program_.micros[i.first_micro + k];
      STD_TORCH_CHECK(m.op >= LaneOp::copy && m.op < LaneOp::count_, "there is no operation ", static_cast<int64_t>(m.op));
      const int64_t registers[3] = {m.a, m.b, m.c};
      for (int r = 0; r < 3; ++r)
        STD_TORCH_CHECK(registers[r] >= 0 && registers[r] < kMaxRegisters && (r >= operands_of(m.op) || defined[registers[r]]),
                        "an operation reads register ", registers[r], ", which holds nothing");
      STD_TORCH_CHECK(m.target >= i.operands && m.target < kMaxRegisters, "an operation writes register ", m.target);
      defined[m.target] = true;
    }
    int64_t reductions = 0;
    for (int64_t k = 0; k < i.outputs; ++k) {
      const LaneOutputRow& output = program_.outputs[i.first_output + k];
      STD_TORCH_CHECK(output.kind >= LaneOutput::store && output.kind <= LaneOutput::product, "an output's kind is unknown");
      STD_TORCH_CHECK(output.source >= 0 && output.source < kMaxRegisters && defined[output.source], "an output is register ",
                      output.source, ", which holds nothing");
      const bool stores = output.kind == LaneOutput::store;
      reductions += !stores;
      const int64_t entries = stores ? total : i.outer;
      inside(range(output.base, output.table, entries), h.arena, "an output");
      for (int64_t e = 0; e < entries; ++e) written_[output.base + entry(output.table, e)] = true;
    }
    STD_TORCH_CHECK(reductions <= kMaxReductions, "a loop has ", reductions, " reductions");
    find_direct(i, total);
  }

  // The last operation of a result that is stored in order may write it straight to its place, if nothing that the loop still
  // reads or writes lies there.
  void find_direct(const LaneInstruction& i, int64_t total) {
    const auto apart = [](const Range& a, const Range& b) { return a.high < b.low || b.high < a.low; };
    for (int64_t k = 0; k < i.outputs; ++k) {
      const LaneOutputRow& output = program_.outputs[i.first_output + k];
      if (output.kind != LaneOutput::store || output.table >= 0) continue;
      const Range place = range(output.base, -1, total);
      bool free = true;
      for (int64_t o = 0; o < i.operands; ++o) {
        const LaneOperand& operand = program_.operands[i.first_operand + o];
        if (operand.space == LaneSpace::arena) free = free && apart(place, range(operand.base, operand.table, total));
      }
      for (int64_t o = 0; o < i.outputs; ++o) {
        const LaneOutputRow& other = program_.outputs[i.first_output + o];
        const int64_t entries = other.kind == LaneOutput::store ? total : i.outer;
        if (o != k) free = free && apart(place, range(other.base, other.table, entries));
      }
      for (int64_t m = i.micros - 1; free && m >= 0; --m) {
        const int64_t micro = i.first_micro + m;
        if (program_.micros[micro].target != output.source) continue;
        if (checked_.direct[micro] < 0) checked_.direct[micro] = i.first_output + k;
        break;
      }
    }
  }

  // Reads arena[base + first + second] for all entries of two tables.
  void sums(int64_t base, int64_t first, int64_t rows, int64_t second, int64_t depth, const char* what) {
    const Range a = range(base, first, rows), b = range(0, second, depth);
    inside({a.low + b.low, a.high + b.high}, program_.header->arena, what);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth; ++k) read(base + entry(first, r) + entry(second, k), what);
  }

  void product(const LaneInstruction& i) {
    const LaneHeader& h = *program_.header;
    count(i.rows, 1, "the rows of a product");
    count(i.columns, 1, "the columns of a product");
    count(i.depth, 1, "the depth of a product");
    sums(i.source, i.row_table, i.rows, i.k_table, i.depth, "a product's operand");
    const int64_t panels = (i.columns + kLanePanel - 1) / kLanePanel;
    STD_TORCH_CHECK(i.depth <= kMost / (panels * kLanePanel) && in(i.weight, panels * kLanePanel * i.depth, h.constants),
                    "a product's weight lies outside of the constants");
    STD_TORCH_CHECK(i.bias == -1 || in(i.bias, i.columns, h.constants), "a product's bias lies outside of the constants");
    const Range a = range(i.target, i.target_row_table, i.rows), b = range(0, i.target_column_table, i.columns);
    inside({a.low + b.low, a.high + b.high}, h.arena, "a product's result");
    for (int64_t r = 0; r < i.rows; ++r)
      for (int64_t c = 0; c < i.columns; ++c)
        written_[i.target + entry(i.target_row_table, r) + entry(i.target_column_table, c)] = true;
  }

  void pair_product(const LaneInstruction& i) {
    count(i.batch, 1, "the matrices of a product");
    count(i.rows, 1, "the rows of a product");
    count(i.columns, 1, "the columns of a product");
    count(i.depth, 1, "the depth of a product");
    STD_TORCH_CHECK(i.batch <= kMost / i.rows && i.batch * i.rows <= kMost / i.columns && i.batch <= kMost / i.columns,
                    "a product is too large");
    sums(i.source, i.row_table, i.batch * i.rows, i.k_table, i.depth, "a product's operand");
    sums(i.other, i.other_table, i.batch * i.columns, i.other_k_table, i.depth, "a product's operand");
    const int64_t entries = i.batch * i.rows * i.columns;
    inside(range(i.target, i.target_row_table, entries), program_.header->arena, "a product's result");
    for (int64_t e = 0; e < entries; ++e) written_[i.target + entry(i.target_row_table, e)] = true;
  }

  void scan(const LaneInstruction& i) {
    const LaneHeader& h = *program_.header;
    const int64_t total = index_space(i);
    STD_TORCH_CHECK(in(i.first_operand, 1, h.operands), "a scan's operand lies outside of the code");
    const LaneOperand& operand = program_.operands[i.first_operand];
    inside(range(operand.base, operand.table, total), h.arena, "a scan's operand");
    for (int64_t e = 0; e < total; ++e) read(operand.base + entry(operand.table, e), "a scan's operand");
    inside(range(i.target, i.target_row_table, total), h.arena, "a scan's result");
    for (int64_t e = 0; e < total; ++e) written_[i.target + entry(i.target_row_table, e)] = true;
  }

  CheckedLanes& checked_;
  LaneProgram& program_;
  std::vector<bool> written_;
};

bool same(const CheckedLanes& known, const int64_t* code, int64_t count, const int32_t* tables, int64_t entries) {
  return static_cast<int64_t>(known.code.size()) == count && static_cast<int64_t>(known.tables.size()) == entries &&
         std::memcmp(known.code.data(), code, count * sizeof(int64_t)) == 0 &&
         (entries == 0 || std::memcmp(known.tables.data(), tables, entries * sizeof(int32_t)) == 0);
}

}  // namespace

std::shared_ptr<const CheckedLanes> checked_lanes(const int64_t* code, int64_t count, const int32_t* tables, int64_t entries) {
  // A thread mostly runs the program that it ran before. The programs of all threads are kept, the last used in front.
  thread_local std::shared_ptr<const CheckedLanes> mine;
  if (mine && same(*mine, code, count, tables, entries)) return mine;
  constexpr size_t kKept = 64;
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const CheckedLanes>> kept;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = kept.begin(); it != kept.end(); ++it)
      if (same(**it, code, count, tables, entries)) {
        std::rotate(kept.begin(), it, it + 1);
        return mine = kept.front();
      }
  }
  auto checked = std::make_shared<CheckedLanes>();
  checked->code.assign(code, code + count);
  checked->tables.assign(tables, tables + entries);
  Check(*checked).run();
  checked->cost = cost_of(checked->program);
  const std::lock_guard<std::mutex> lock(mutex);
  kept.insert(kept.begin(), checked);
  if (kept.size() > kKept) kept.pop_back();
  return mine = checked;
}

}  // namespace fastebm
