// Which instruction set the CPU kernels use.
#include "variants.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastebm {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
    if (name == isa_name(isa)) return isa;
  throw std::runtime_error("unknown CPU variant '" + name + "': need baseline, avx2, avx512, avx512_bf16 or amx");
}

namespace {

// Matrix units for bfloat16, which a process must ask Linux for before its first tile.
bool has_amx() {
#if defined(FASTEBM_EMULATE_TILES)  // the products alone; rounding to bfloat16 is that of the CPU
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__x86_64__) && defined(__linux__)
  static const bool found = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;          // amx-bf16, amx-tile
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
#else
  return false;
#endif
}

#if defined(__x86_64__)
// Asked of the CPU itself: Clang's __builtin_cpu_supports doesn't know the name. That the system keeps the registers it works on,
// the question about AVX2 answers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return Isa::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? Isa::avx512 : has_amx() ? Isa::amx : Isa::avx512_bf16;
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}

namespace {

// -1 until first asked. Reading the environment here, not while the library loads, lets a bad value raise where it can be caught.
std::atomic<int> chosen{-1};

void require_supported(Isa isa) {
  if (static_cast<int>(isa) > static_cast<int>(best_isa()))
    throw std::runtime_error(std::string("CPU variant '") + isa_name(isa) + "' asked for, but this CPU runs at most '" +
                             isa_name(best_isa()) + "'");
}

}  // namespace

void set_active_isa(Isa isa) {
  require_supported(isa);
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
}

Isa active_isa() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Isa>(now);
  const char* asked = std::getenv("FASTEBM_CPU");
  set_active_isa(asked && *asked ? isa_from_name(asked) : best_isa());
  return static_cast<Isa>(chosen.load(std::memory_order_relaxed));
}

}  // namespace fastebm
