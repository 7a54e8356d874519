// fastebm._C, the extension module: loading it registers the CPU operators.
//
// Its functions report how it was built, what this CPU can run, and whether the random numbers are right.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/noise.h"

namespace py = pybind11;

namespace fastebm {
namespace {

struct RawBits {
  static FASTEBM_INLINE void draw(float* __restrict out, const BitsGroup& bits) {
    for (int i = 0; i < kLanes; ++i)
      for (int lane = 0; lane < 4; ++lane) std::memcpy(&out[4 * i + lane], &bits.lane[lane][i], sizeof(float));
  }
};

template <class Kernel, Isa isa>
FASTEBM_INLINE void first_stretch_body(float* out, uint32_t quad, const NoiseAddress& at) {
  draw_stretch<Kernel, isa>(out, quad, kStretch, at);
}
FASTEBM_VARIANTS(first_stretch, (float* out, uint32_t quad, const NoiseAddress& at), (out, quad, at))

struct KnownAnswer {
  uint32_t counter[4], key[2], output[4];
};

// The three vectors of Random123 for philox4x32, 10 rounds.
constexpr KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

// Empty when the active instruction set draws the known answers and agrees with the scalar code, else what is wrong.
std::string self_test() {
  alignas(64) float drawn[kStretch];
  for (const KnownAnswer& answer : kKnownAnswers) {
    const NoiseAddress at{answer.key[0], answer.key[1], answer.counter[1], answer.counter[2], answer.counter[3]};
    first_stretch<RawBits>(drawn, answer.counter[0], at);
    if (std::memcmp(drawn, answer.output, sizeof answer.output) != 0) return "Philox4x32-10 misses a Random123 vector";
    first_stretch<NormalNoise>(drawn, answer.counter[0], at);
    for (uint32_t i = 0; i < kStretch / 4; ++i) {
      const Quad bits = philox(answer.counter[0] + i, at);
      float expected[4];
      normal_pair(bits.lane[0], bits.lane[1], expected[0], expected[1]);
      normal_pair(bits.lane[2], bits.lane[3], expected[2], expected[3]);
      if (std::memcmp(drawn + 4 * i, expected, sizeof expected) != 0)
        return std::string("normals of variant '") + isa_name(active_isa()) + "' differ from the scalar code";
    }
  }
  return "";
}

py::dict build_facts() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  facts["cpp_standard"] = static_cast<long>(__cplusplus);
  facts["torch_target"] = FASTEBM_TORCH_TARGET;
  return facts;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FASTEBM_FEATURE(NAME) features[NAME] = static_cast<bool>(__builtin_cpu_supports(NAME))
  FASTEBM_FEATURE("avx2");
  FASTEBM_FEATURE("fma");
  FASTEBM_FEATURE("avx512f");
  FASTEBM_FEATURE("avx512bw");
  FASTEBM_FEATURE("avx512dq");
  FASTEBM_FEATURE("avx512vl");
  FASTEBM_FEATURE("avx512bf16");
#undef FASTEBM_FEATURE
#endif
  return features;
}

// Normals straight from (radius, angle) words through the active instruction set's scalar twin, for tests of the map itself.
std::pair<float, float> normal_from_bits(uint32_t radius_bits, uint32_t angle_bits) {
  float first, second;
  normal_pair(radius_bits, angle_bits, first, second);
  return {first, second};
}

// How weights of fused programs lie for numbers of so many bytes (Layout), and the outputs of a panel.
std::pair<int64_t, int64_t> program_layout(int64_t bytes) {
  const Isa isa = active_isa();
  if (isa == Isa::amx && bytes == 2) return {2, 32};
  if (isa == Isa::avx512_bf16 && bytes == 2) return {3, 32};
  return {1, isa >= Isa::avx512 ? 32 : 16};
}

// 64 bits that tell the contents of some memory apart from others. A change of one word always changes them: each step is
// one-to-one.
uint64_t hash_memory(const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
  constexpr int kWords = 8;
  uint64_t lanes[kWords] = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto mix = [](uint64_t lane, uint64_t word) {
    lane = (lane ^ word) * 0x9e3779b97f4a7c15u;
    return lane ^ (lane >> 29);
  };
  for (const auto& [address, bytes] : ranges) {
    const char* at = reinterpret_cast<const char*>(address);
    size_t left = bytes;
    for (; left >= sizeof lanes; left -= sizeof lanes, at += sizeof lanes) {
      uint64_t words[kWords];
      std::memcpy(words, at, sizeof words);
      for (int i = 0; i < kWords; ++i) lanes[i] = mix(lanes[i], words[i]);
    }
    uint64_t words[kWords] = {};
    std::memcpy(words, at, left);
    for (int i = 0; i < kWords; ++i) lanes[i] = mix(lanes[i], words[i]);
    lanes[0] = mix(lanes[0], bytes);
  }
  uint64_t all = 0;
  for (const uint64_t lane : lanes) all = mix(all, lane);
  return all;
}

// Tiles of 16 images touch 16 pages each: with large ones they stay within the reach of the address caches.
void use_large_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLarge = 2u << 20;
  const uintptr_t begin = (address + kLarge - 1) / kLarge * kLarge, end = (address + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace fastebm

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU operators of fastebm.";
  m.def("build_facts", &fastebm::build_facts);
  m.def("cpu_features", &fastebm::cpu_features);
  m.def("self_test", &fastebm::self_test);
  m.def("normal_from_bits", &fastebm::normal_from_bits);
  m.def("best_variant", [] { return std::string(fastebm::isa_name(fastebm::best_isa())); });
  m.def("active_variant", [] { return std::string(fastebm::isa_name(fastebm::active_isa())); });
  m.def("hash_memory", &fastebm::hash_memory);
  m.def("use_large_pages", &fastebm::use_large_pages);
  m.def("program_layout", &fastebm::program_layout);
  m.def("set_variant", [](const std::string& name) { fastebm::set_active_isa(fastebm::isa_from_name(name)); });
}
