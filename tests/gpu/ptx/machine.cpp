// How warps go through a program, and the functions that Python calls.
#include "machine.h"

#include <bit>
#include <climits>
#include <cstring>

namespace ptx {
namespace {

using Fault = std::runtime_error;

// A fault, with the instruction and the thread.
struct Located : Fault {
  Located(const std::string& what, const Warp& warp)
      : Fault(what), instruction(warp.current), thread(warp.index * kLanes + warp.lane) {}
  int32_t instruction, thread;
};

// A register that nothing was written to is a NaN, and an address outside of everything.
constexpr uint64_t kUnwritten = 0x7FF8DEAD7FC5DEADull;

void enter(Warp& warp, const Program& program, int function, int32_t back, const Op* call) {
  warp.frames.emplace_back();
  Frame& frame = warp.frames.back();
  frame.registers.resize(program.functions[function].registers);
  for (Lanes& lanes : frame.registers) lanes.fill(kUnwritten);
  frame.back = back, frame.call = call;
  warp.registers = frame.registers.data();
}

// Operands of a call are arguments, then where results go; numbers are the function and how many arguments.
int32_t call(Warp& warp, const Program& program, const Op& op, int32_t next) {
  std::vector<Lanes> arguments;
  for (int i = 0; i < op.numbers[1]; ++i) arguments.push_back(warp.in(op.operands[i]));
  enter(warp, program, op.numbers[0], next, &op);
  std::copy(arguments.begin(), arguments.end(), warp.registers);
  return program.functions[op.numbers[0]].first;
}

int32_t leave(Warp& warp, const Program& program) {
  const Frame callee = std::move(warp.frames.back());
  warp.frames.pop_back();
  warp.registers = warp.frames.back().registers.data();
  const Op& op = *callee.call;
  const int arguments = op.numbers[1];
  for (int i = arguments; i < op.count; ++i) {
    warp.out(op.operands[i]) = callee.registers[program.functions[op.numbers[0]].parameters + i - arguments];
  }
  return callee.back;
}

Mask guarded(const Warp& warp, const Op& op, Mask lanes) {
  if (op.guard == kUnguarded) return lanes;
  const Lanes& guard = warp.in(op.guard);
  Mask found = 0;
  for (int l = 0; l < kLanes; ++l) found |= Mask((guard[l] & 1) != op.negated) << l;
  return found & lanes;
}

// Runs the lanes of `group`, which are at the same instruction, until they reach lanes that wait at `limit`, part, end,
// or come to a barrier of the block.
void run_group(Warp& warp, const Program& program, Mask group, int32_t limit, int64_t& budget) {
  int32_t pc = warp.pc[std::countr_zero(group)];
  const auto set = [&](Mask lanes, int32_t to) {
    for (int l = 0; l < kLanes; ++l) {
      if (lanes >> l & 1) warp.pc[l] = to;
    }
  };
  while (pc < limit) {
    const Op& op = program.ops[pc];
    warp.current = pc, warp.lane = std::countr_zero(group);
    if (--budget < 0) throw Fault("the launch doesn't end");
    const Mask active = guarded(warp, op, group);
    if (op.kind == kPlain) {
      if (active) op.run(warp, op, active);
      ++pc;
    } else if (op.kind == kBranch) {
      if (active == group) {
        pc = op.numbers[0];
      } else if (!active) {
        ++pc;
      } else {
        set(active, op.numbers[0]);
        return set(group & ~active, pc + 1);
      }
    } else if (op.kind == kExit) {
      warp.alive &= ~active;
      if (active == group) return;
      group &= ~active;
      ++pc;
    } else if (!active) {
      ++pc;
    } else if (active != warp.alive) {
      throw Fault("not all lanes of the warp come to this together");
    } else if (op.kind == kCall) {
      pc = call(warp, program, op, pc + 1);
    } else if (op.kind == kReturn) {
      pc = leave(warp, program);
    } else {
      warp.at_barrier = true;
      return set(group, pc + 1);
    }
  }
  set(group, pc);
}

void run_to_barrier(Warp& warp, const Program& program, int64_t& budget) {
  while (warp.alive && !warp.at_barrier) {
    int32_t first = INT32_MAX, second = INT32_MAX;
    for (int l = 0; l < kLanes; ++l) {
      if (warp.alive >> l & 1) first = std::min(first, warp.pc[l]);
    }
    Mask group = 0;
    for (int l = 0; l < kLanes; ++l) {
      if (!(warp.alive >> l & 1)) continue;
      if (warp.pc[l] == first) {
        group |= 1u << l;
      } else {
        second = std::min(second, warp.pc[l]);
      }
    }
    run_group(warp, program, group, second, budget);
  }
}

struct Launch {
  std::array<uint32_t, 3> grid;
  int warps;
  uint64_t shared_bytes;
  int64_t budget;
  std::mt19937 random;
};

void run_block(const Program& program, Launch& launch, Block& block) {
  std::vector<uint8_t> memory(launch.shared_bytes, 0xFF);
  block.shared->clear();
  block.shared->add(kSharedBase, memory.data(), memory.size(), true);
  std::deque<Warp> warps(launch.warps);
  std::vector<Warp*> order;
  for (Warp& warp : warps) {
    warp.block = &block, warp.index = order.size();
    warp.pc.fill(program.functions[0].first);
    for (auto& groups : warp.groups) groups.resize(1);
    enter(warp, program, 0, -1, nullptr);
    order.push_back(&warp);
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), launch.random);
    for (Warp* warp : order) {
      try {
        run_to_barrier(*warp, program, launch.budget);
      } catch (const Fault& fault) {
        throw Located(fault.what(), *warp);
      }
    }
    const auto waits = [](const Warp* warp) { return warp->at_barrier; };
    const auto some = std::find_if(order.begin(), order.end(), waits);
    if (some == order.end()) return;
    if (!std::all_of(order.begin(), order.end(), waits)) throw Located("waits for warps that have ended", **some);
    for (Warp* warp : order) warp->at_barrier = false;
    ++block.epoch;
  }
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// One instruction as Python hands it over.
struct PtxInstruction {
  int32_t kind, guard, negated, first, count;
  int64_t numbers[3];
};

int32_t ptx_knows(const char* name) { return handler_of(name) != nullptr; }

// `names` are those of plain instructions, `operands` those of all, one after the other.
Program* ptx_program(const PtxInstruction* instructions, const char* const* names, int32_t count, const int32_t* operands,
                     int32_t num_operands, const Function* functions, int32_t num_functions, int32_t num_constants) {
  auto* program = new Program;
  program->operands.assign(operands, operands + num_operands);
  program->functions.assign(functions, functions + num_functions);
  program->constants.resize(num_constants);
  for (int32_t i = 0; i < count; ++i) {
    const PtxInstruction& given = instructions[i];
    Op op{Kind(given.kind), nullptr, given.guard, given.negated != 0, program->operands.data() + given.first, given.count, {}};
    std::copy(given.numbers, given.numbers + 3, op.numbers);
    if (op.kind == kPlain) op.run = handler_of(names[i]);
    program->ops.push_back(op);
  }
  return program;
}

void ptx_free(Program* program) { delete program; }

// Runs a grid of blocks. `constants` are the program's, the same for all lanes; `tensors` are (address, bytes).
// Returns 0, or 1 with a message and (instruction, thread, block x, y, z) of a fault.
int32_t ptx_run(Program* program, const uint64_t* constants, const uint64_t* tensors, int32_t num_tensors,
                const uint32_t* grid, int32_t warps, uint64_t shared_bytes, int64_t budget, uint32_t seed, char* message,
                int32_t message_bytes, int32_t* where) {
  for (size_t i = 0; i < program->constants.size(); ++i) program->constants[i].fill(constants[i]);
  Space global("the tensors of this launch"), shared("shared memory");
  for (int i = 0; i < num_tensors; ++i) {
    global.add(tensors[2 * i], reinterpret_cast<uint8_t*>(tensors[2 * i]), tensors[2 * i + 1], false);
  }
  Launch launch{{grid[0], grid[1], grid[2]}, warps, shared_bytes, budget, std::mt19937(seed)};
  std::vector<uint32_t> order(grid[0] * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), launch.random);
  Block block{program, &global, &shared, 0, 1, {}, launch.grid, warps};
  try {
    for (uint32_t number : order) {
      block.place = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
      block.first_epoch = ++block.epoch;
      run_block(*program, launch, block);
    }
    return 0;
  } catch (const Located& fault) {
    strncpy(message, fault.what(), message_bytes - 1);
    message[message_bytes - 1] = 0;
    where[0] = fault.instruction, where[1] = fault.thread;
    std::copy(block.place.begin(), block.place.end(), where + 2);
    return 1;
  }
}
}
