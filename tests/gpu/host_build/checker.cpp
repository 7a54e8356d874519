// See checker.h. Compiled without sanitizers: it is what their calls end in.
#include "checker.h"

#include <dlfcn.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace host_build {

Index places[4];

namespace {

Index &thread_index = places[0], &block_index = places[1], &block_extent = places[2], &grid_extent = places[3];

// Who touched an element: thread, the number of barriers it had passed, block. No two touches of one thread differ.
using Touch = uint64_t;
constexpr Touch kNobody = 0;
constexpr int kThreadBits = 11, kPhaseBits = 20;
constexpr unsigned kMostThreads = 1024;

bool same_block(Touch a, Touch b) { return a >> (kThreadBits + kPhaseBits) == b >> (kThreadBits + kPhaseBits); }
bool same_phase(Touch a, Touch b) { return a >> kThreadBits == b >> kThreadBits; }
// Whether nothing in the launch says which of two comes first.
bool unordered(Touch a, Touch b) { return a != kNobody && b != kNobody && a != b && (!same_block(a, b) || same_phase(a, b)); }

struct Element {
  Touch writer = kNobody, reader = kNobody;
  bool many_threads = false;  // other threads read it too since the last barrier
  bool many_blocks = false;
};

struct Memory {
  std::string name;
  uintptr_t begin;
  std::size_t bytes, grain;
  bool writable, shared = false;
  std::vector<Element> elements;

  bool holds(uintptr_t at, std::size_t size) const { return at - begin < bytes && bytes - (at - begin) >= size; }
  void forget() { elements.assign((bytes + grain - 1) / grain, {}); }
};

// The system makes room for what is local to a thread when some of it is used first.
thread_local volatile char first_use;

// The variables of this library that are local to a thread: `__shared__` of the kernels.
Memory find_shared_memory() {
  first_use = 0;
  Memory found{"shared memory", 0, 0, 1, true, true, {}};
  const auto look = [](dl_phdr_info* info, std::size_t, void* result) {
    Memory& found = *static_cast<Memory*>(result);
    const auto here = reinterpret_cast<uintptr_t>(&find_shared_memory);
    bool ours = false;
    std::size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      ours = ours || (header.p_type == PT_LOAD && here - (info->dlpi_addr + header.p_vaddr) < header.p_memsz);
      if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (!ours || info->dlpi_tls_data == nullptr) return 0;
    found.begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data), found.bytes = bytes;
    return 1;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

// Of the device that is guarded; null where none is.
const void* current_stream = nullptr;

constexpr std::size_t kStackBytes = 1 << 16;

// A stack. Threads run on one after another, until one waits at a barrier: then the others get another stack.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Index thread_index;
  unsigned thread;
  const std::source_location* waits = nullptr;
};

struct Machine {
  std::vector<Memory> memories;
  Memory shared;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::mt19937_64 random{1};
  std::string error, reported;

  ucontext_t home;
  Fiber* fiber = nullptr;  // the one that runs, or null
  const std::function<void()>* thread = nullptr;
  std::vector<unsigned> waiting_to_start;
  unsigned ended = 0;
  uint64_t block = 0, phase = 0;
  uint64_t launches = 0, accesses = 0, barriers = 0;

  Touch touch() const { return (block << kPhaseBits | phase) << kThreadBits | (fiber->thread + 1); }

  [[gnu::cold]] void fail(const std::string& what) {
    if (error.empty()) {
      error = what;
      if (fiber) error += " (thread " + std::to_string(fiber->thread) + " of block " + std::to_string(block) + ")";
    }
    if (fiber) leave();
  }

  // Back to the launch, from a fiber.
  void leave() {
    Fiber* left = fiber;
    fiber = nullptr;
    swapcontext(&left->context, &home);
  }

  void enter(Fiber* next) {
    fiber = next;
    thread_index = next->thread_index;
    swapcontext(&home, &next->context);
  }

  void run_threads() {
    while (!waiting_to_start.empty()) {
      const unsigned t = fiber->thread = waiting_to_start.back();
      waiting_to_start.pop_back();
      fiber->thread_index = {t % block_extent.x, t / block_extent.x % block_extent.y, t / block_extent.x / block_extent.y};
      thread_index = fiber->thread_index;
      (*thread)();
      ++ended;
    }
    leave();
  }

  void run_block();
  void access(uintptr_t at, std::size_t size, bool writes);
  void access(Memory& memory, uintptr_t at, std::size_t size, bool writes);
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

void start_threads() { machine().run_threads(); }

void Machine::run_block() {
  const unsigned threads = block_extent.x * block_extent.y * block_extent.z;
  waiting_to_start.resize(threads);
  std::iota(waiting_to_start.begin(), waiting_to_start.end(), 0u);
  std::shuffle(waiting_to_start.begin(), waiting_to_start.end(), random);
  std::memset(reinterpret_cast<void*>(shared.begin), 0xff, shared.bytes);  // as floats, NaN
  shared.forget();
  ended = 0, phase = 0;
  std::vector<Fiber*> waiting;
  while (!waiting_to_start.empty() && error.empty()) {
    if (idle.empty()) {
      fibers.push_back(std::make_unique<Fiber>());
      idle.push_back(fibers.back().get());
    }
    Fiber* next = idle.back();
    idle.pop_back();
    getcontext(&next->context);
    next->context.uc_stack.ss_sp = next->stack.get(), next->context.uc_stack.ss_size = kStackBytes;
    next->context.uc_link = nullptr;
    next->waits = nullptr;
    makecontext(&next->context, start_threads, 0);
    enter(next);
    (next->waits ? waiting : idle).push_back(next);
  }
  while (!waiting.empty() && error.empty()) {
    if (ended > 0) fail("some threads of a block ended while others wait at a barrier");
    for (const Fiber* one : waiting)
      if (one->waits->line() != waiting[0]->waits->line()) fail("threads of a block wait at different barriers");
    ++phase, ++barriers;
    std::shuffle(waiting.begin(), waiting.end(), random);
    std::vector<Fiber*> again;
    for (Fiber* one : waiting) {
      one->waits = nullptr;
      if (error.empty()) enter(one);
      (one->waits && error.empty() ? again : idle).push_back(one);
    }
    waiting = std::move(again);
  }
  idle.insert(idle.end(), waiting.begin(), waiting.end());
}

void Machine::access(Memory& memory, uintptr_t at, std::size_t size, bool writes) {
  const char* what = writes ? "writes" : "reads";
  if (writes && !memory.writable) fail("writes " + memory.name + ", which is only to be read");
  const Touch me = touch();
  for (std::size_t i = (at - memory.begin) / memory.grain; i <= (at - memory.begin + size - 1) / memory.grain; ++i) {
    Element& element = memory.elements[i];
    bool race = unordered(element.writer, me);
    if (writes && element.reader != kNobody)
      race = race || element.many_blocks || unordered(element.reader, me) ||
             (element.many_threads && same_phase(element.reader, me));
    if (race) fail(std::string(what) + " " + memory.name + " in a race with another thread");
    if (!writes && memory.shared && element.writer == kNobody) fail("reads shared memory that no thread wrote");
    if (writes) {
      element.writer = me;
    } else {
      if (element.reader != kNobody && element.reader != me) {
        element.many_blocks = element.many_blocks || !same_block(element.reader, me);
        element.many_threads = same_phase(element.reader, me);
      }
      element.reader = me;
    }
  }
}

void Machine::access(uintptr_t at, std::size_t size, bool writes) {
  if (!fiber || at - reinterpret_cast<uintptr_t>(fiber->stack.get()) < kStackBytes) return;
  if (at - reinterpret_cast<uintptr_t>(places) < sizeof places) return;
  ++accesses;
  if (shared.holds(at, size)) return access(shared, at, size, writes);
  for (Memory& memory : memories)
    if (memory.holds(at, size) && (memory.writable || !writes)) return access(memory, at, size, writes);
  for (Memory& memory : memories)
    if (memory.holds(at, size)) return access(memory, at, size, writes);
  std::string nearest = "all that it was given";
  std::size_t distance = 4096;
  for (const Memory& memory : memories) {
    const std::size_t before = memory.begin - at, after = at + size - (memory.begin + memory.bytes);
    if (before < distance) distance = before, nearest = std::to_string(before) + " bytes before " + memory.name;
    if (after < distance) distance = after, nearest = std::to_string(after) + " bytes after " + memory.name;
  }
  fail(std::string(writes ? "writes " : "reads ") + std::to_string(size) + " bytes outside of its memory, " + nearest);
}

}  // namespace

void launch(Index grid, Index block, const void* stream, const std::function<void()>& thread, const void* frame) {
  Machine& m = machine();
  if (!m.error.empty()) return;
  if (stream != current_stream) return m.fail("a launch on another stream than the current one");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || grid.x >> 31 || grid.y > 65535 || grid.z > 65535)
    return m.fail("invalid configuration argument");
  ++m.launches;
  m.thread = &thread, grid_extent = grid, block_extent = block;
  m.shared = find_shared_memory();
  for (Memory& memory : m.memories) memory.forget();
  const auto stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  m.memories.push_back({"the arguments", stack, reinterpret_cast<uintptr_t>(frame) - stack, 8, false, false, {}});
  m.memories.back().forget();
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  std::shuffle(order.begin(), order.end(), m.random);
  for (const uint64_t b : order) {
    if (!m.error.empty()) break;
    m.block = b;
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    m.run_block();
  }
  m.memories.pop_back();
}

void wait_at_barrier(const std::source_location& where) {
  Machine& m = machine();
  const std::source_location here = where;
  m.fiber->waits = &here;
  m.leave();
}

constexpr int kMostRsqrtError = 4, kByChance = 99;
static int fixed_rsqrt_error = kByChance;

int rsqrt_error() {
  if (fixed_rsqrt_error != kByChance) return fixed_rsqrt_error;
  static std::minstd_rand random{1};
  return static_cast<int>(random() % (2 * kMostRsqrtError + 1)) - kMostRsqrtError;
}

void fix_rsqrt_error(int units) { fixed_rsqrt_error = units; }

const char* last_error() {
  Machine& m = machine();
  m.reported = std::move(m.error);
  m.error.clear();
  return m.reported.empty() ? nullptr : m.reported.c_str();
}

}  // namespace host_build

using host_build::machine;

// What Python says, in order: the tensors of a call, the call, and that it is over.
#pragma GCC visibility push(default)
extern "C" {

void host_build_give(const char* name, const void* begin, std::size_t bytes, std::size_t grain, int writable) {
  for (auto& memory : machine().memories) {
    if (memory.begin != reinterpret_cast<uintptr_t>(begin) || memory.bytes != bytes) continue;
    memory.writable = memory.writable || writable;  // an update in place is given its tensor twice
    return;
  }
  machine().memories.push_back({name, reinterpret_cast<uintptr_t>(begin), bytes, grain, writable != 0, false, {}});
}

void host_build_take_back() {
  machine().memories.clear();
  machine().error.clear();
}

uint64_t host_build_launches() { return machine().launches; }
uint64_t host_build_accesses() { return machine().accesses; }
uint64_t host_build_barriers() { return machine().barriers; }
}
#pragma GCC visibility pop

// --- what the compiler calls before an access (-fsanitize=thread)

extern "C" {

#define ACCESS_OF(bytes)                                                                                           \
  void __tsan_read##bytes(void* at) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, false); }           \
  void __tsan_write##bytes(void* at) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* at) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, false); } \
  void __tsan_unaligned_write##bytes(void* at) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, true); }
ACCESS_OF(1)
ACCESS_OF(2)
ACCESS_OF(4)
ACCESS_OF(8)
ACCESS_OF(16)

void __tsan_read_range(void* at, std::size_t bytes) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, false); }
void __tsan_write_range(void* at, std::size_t bytes) { machine().access(reinterpret_cast<uintptr_t>(at), bytes, true); }
void __tsan_init() {}

// --- what it calls where behaviour is undefined (-fsanitize=alignment,bounds,shift,signed-integer-overflow)

struct Source {
  const char* file;
  uint32_t line, column;
};

static void undefined(const char* what, const Source* source) {
  const char* name = std::strrchr(source->file, '/');
  machine().fail(std::string(what) + " in " + (name ? name + 1 : source->file) + ":" + std::to_string(source->line));
}

void __ubsan_handle_type_mismatch_v1(const Source* source, void*) { undefined("a misaligned or null access", source); }
void __ubsan_handle_out_of_bounds(const Source* source, void*) { undefined("an index outside of its array", source); }
void __ubsan_handle_shift_out_of_bounds(const Source* source, void*, void*) { undefined("a shift out of range", source); }
void __ubsan_handle_add_overflow(const Source* source, void*, void*) { undefined("an addition that overflows", source); }
void __ubsan_handle_sub_overflow(const Source* source, void*, void*) { undefined("a subtraction that overflows", source); }
void __ubsan_handle_mul_overflow(const Source* source, void*, void*) { undefined("a product that overflows", source); }
void __ubsan_handle_negate_overflow(const Source* source, void*) { undefined("a negation that overflows", source); }
void __ubsan_handle_divrem_overflow(const Source* source, void*, void*) { undefined("a division that overflows", source); }

// --- what csrc/cuda/register.cpp asks of torch: there is no device, and what it allocates is given to kernels

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  host_build::current_stream = *guard = &host_build::current_stream;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) {
  host_build::current_stream = nullptr;
  return 0;
}

// Fails where the device is not guarded: launches would go to whatever device is current.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = const_cast<void*>(host_build::current_stream);
  return *stream == nullptr;
}

int32_t aoti_torch_get_data_ptr(void*, void**);
int32_t aoti_torch_get_storage_size(void*, int64_t*);

int32_t torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version) {
  using Call = int32_t (*)(const char*, const char*, uint64_t*, uint64_t);
  static const auto torchs_own = reinterpret_cast<Call>(dlsym(RTLD_NEXT, "torch_call_dispatcher"));
  const int32_t failed = torchs_own(name, overload, stack, version);
  if (failed == 0 && std::strcmp(name, "aten::new_empty") == 0) {
    void* const tensor = reinterpret_cast<void*>(stack[0]);
    void* begin = nullptr;
    int64_t bytes = 0;
    aoti_torch_get_data_ptr(tensor, &begin), aoti_torch_get_storage_size(tensor, &bytes);
    host_build_give("scratch memory", begin, static_cast<std::size_t>(bytes), 1, 1);
  }
  return failed;
}
}
