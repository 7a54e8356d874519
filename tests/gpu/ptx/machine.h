// A machine that runs decoded PTX: blocks one after the other, their warps in random order from barrier to barrier, the 32
// lanes of a warp together. Lanes that branch apart go on separately, those that are behind first, until they meet again.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "memory.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr uint64_t kSharedBase = 1024;  // so that address 0 is a fault there, too

using Mask = uint32_t;
// A register of all lanes. Narrower types lie in the low bits; instructions read no more than their type has.
using Lanes = std::array<uint64_t, kLanes>;

struct Warp;
struct Op;
using Handler = void (*)(Warp&, const Op&, Mask);

enum Kind : int32_t { kPlain, kBranch, kCall, kReturn, kExit, kBarrier };

// One instruction. Operands >= 0 are registers of the function, others are constants: -1 is constant 0.
struct Op {
  Kind kind;
  Handler run;
  int32_t guard;  // a predicate, or kUnguarded
  bool negated;
  const int32_t* operands;
  int32_t count;
  int64_t numbers[3];
};
constexpr int32_t kUnguarded = INT32_MIN;

struct Function {
  int32_t first, registers, parameters;  // its first instruction; registers 0... are parameters, then results
};

struct Program {
  std::vector<Op> ops;
  std::vector<int32_t> operands;
  std::vector<Lanes> constants;
  std::vector<Function> functions;  // the first is the kernel
};

struct Copy {
  uint64_t to, from;
  int size, count;  // bytes in all, and those that are read; the others become zero
  uint32_t since;
};

// A product of warpgroups on its way: `wgmma`. Its sums are in registers, its factors in shared memory, or A as well.
struct Product {
  const Op* op;
  Lanes a[4];
  uint64_t a_place, b_place;
  bool adds;
  uint32_t since;
};

struct Frame {
  std::vector<Lanes> registers;
  int32_t back;  // where the caller goes on
  const Op* call;
};

struct Block;

struct Warp {
  Block* block;
  int index;
  Mask alive = kAllLanes;
  uint32_t turn = 1;
  bool at_barrier = false;
  std::array<int32_t, kLanes> pc{};
  std::deque<Frame> frames;
  Lanes* registers = nullptr;
  int32_t current = 0;  // instruction, for messages
  int lane = 0;         // the same
  // Asynchronous copies of each lane, by group; the last one is still open.
  std::array<std::vector<std::vector<Copy>>, kLanes> groups;
  std::vector<std::vector<Product>> products{1};  // the same

  const Lanes& in(int32_t operand) const;
  Lanes& out(int32_t operand) { return registers[operand]; }
  Moment now(int lane) const;
};

struct Block {
  const Program* program;
  Space *global, *shared;
  uint32_t first_epoch, epoch;
  std::array<uint32_t, 3> place, grid;
  int warps;
};

inline const Lanes& Warp::in(int32_t operand) const {
  return operand >= 0 ? registers[operand] : block->program->constants[-1 - operand];
}

inline Moment Warp::now(int lane) const {
  return {block->first_epoch, block->epoch, turn, static_cast<uint16_t>(index * kLanes + lane)};
}

// Lanes of `from` where the mask has them.
inline void blend(Lanes& to, const Lanes& from, Mask mask) {
  if (mask == kAllLanes) {
    to = from;
  } else {
    for (int l = 0; l < kLanes; ++l) {
      if (mask >> l & 1) to[l] = from[l];
    }
  }
}

// By its name in PTX; null where there is none.
Handler handler_of(const std::string& name);

}  // namespace ptx
