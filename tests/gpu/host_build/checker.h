// Runs the blocks and threads of a CUDA kernel on a CPU and checks each access that they make. What it checks:
//
//   - memory: a thread touches tensors that its launch was given, shared memory and its own stack, and writes no input;
//   - races: two threads touch the same element, one of them writes, and no barrier and no end of a launch lies between;
//   - barriers: either all threads of a block wait at one, or none does;
//   - shared memory is written before it is read;
//   - undefined behaviour that UBSan knows: misaligned vectors, indices of arrays, shifts, overflow.
//
// The kernels are compiled with -fsanitize=thread and -fsanitize=alignment,..., but not linked with a sanitizer's runtime:
// the calls that the compiler puts before each access end in checker.cpp. The first mistake ends the launch, and is what
// CUDA would be asked for by cudaGetLastError.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>

namespace host_build {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// threadIdx, blockIdx, blockDim and gridDim of the thread that runs.
extern Index places[4];

// `stream` must be the current one. Up to `frame` the stack holds what the caller hands to each thread.
void launch(Index grid, Index block, const void* stream, const std::function<void()>& thread, const void* frame);

void wait_at_barrier(const std::source_location& where);

// Units in the last place by which an approximate root is wrong now: by chance, or the same until it is changed.
int rsqrt_error();
void fix_rsqrt_error(int units);

// What was wrong with a launch since it was asked last, or null.
const char* last_error();

}  // namespace host_build
