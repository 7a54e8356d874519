// What each instruction of PTX does to the lanes of a warp, as the PTX ISA says. Names are those of PTX without what
// changes no result (cache hints); loads and stores are "load" and "store", which Python decodes.
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <unordered_map>

#include "machine.h"

namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
struct bf16 {
  u16 bits;
};

// Types --------------------------------------------------------------------------------------------------------------

template <class T>
T as(u64 bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else {
    using Unsigned = std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>;
    return std::bit_cast<T>(static_cast<Unsigned>(bits));
  }
}

// Arithmetic gives one NaN, whatever went in.
template <class T>
u64 bits_of(T value) {
  if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<u64>(value);  // with the sign, as registers wider than the type want it
  } else if constexpr (std::is_same_v<T, float>) {
    return value != value ? 0x7FFFFFFFu : std::bit_cast<u32>(value);
  } else if constexpr (std::is_same_v<T, double>) {
    return value != value ? 0x7FF8000000000000ull : std::bit_cast<u64>(value);
  } else if constexpr (std::is_same_v<T, f16>) {
    return value != value ? 0x7FFF : std::bit_cast<u16>(value);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<u16>(value);
  } else {
    return std::bit_cast<u32>(value);
  }
}

float widened(bf16 value) { return std::bit_cast<float>(u32(value.bits) << 16); }

bf16 to_bf16(float value) {  // to the nearest, ties to even
  const u32 bits = std::bit_cast<u32>(value);
  if (value != value) return {0x7FFF};
  return {static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

u32 to_tf32(float value) {  // to the nearest, ties away from zero
  const u32 bits = std::bit_cast<u32>(value);
  if (value != value) return 0x7FFFFFFF;
  return std::isinf(value) ? bits : (bits + 0x1000) & 0xFFFFE000u;
}

// Lane by lane -------------------------------------------------------------------------------------------------------

template <class Result, class A, class F>
void map(Warp& warp, const Op& op, Mask mask, F f) {
  const Lanes& a = warp.in(op.operands[1]);
  Lanes found;
  for (int l = 0; l < kLanes; ++l) found[l] = bits_of<Result>(f(as<A>(a[l])));
  blend(warp.out(op.operands[0]), found, mask);
}

template <class Result, class A, class B, class F>
void map(Warp& warp, const Op& op, Mask mask, F f) {
  const Lanes &a = warp.in(op.operands[1]), &b = warp.in(op.operands[2]);
  Lanes found;
  for (int l = 0; l < kLanes; ++l) found[l] = bits_of<Result>(f(as<A>(a[l]), as<B>(b[l])));
  blend(warp.out(op.operands[0]), found, mask);
}

template <class Result, class A, class B, class C, class F>
void map(Warp& warp, const Op& op, Mask mask, F f) {
  const Lanes &a = warp.in(op.operands[1]), &b = warp.in(op.operands[2]), &c = warp.in(op.operands[3]);
  Lanes found;
  for (int l = 0; l < kLanes; ++l) found[l] = bits_of<Result>(f(as<A>(a[l]), as<B>(b[l]), as<C>(c[l])));
  blend(warp.out(op.operands[0]), found, mask);
}

using Table = std::unordered_map<std::string, Handler>;

// The types of operands, then a function of them; the result's type comes first.
#define DEFINE(name, types, ...) \
  table[name] = [](Warp& warp, const Op& op, Mask mask) { map<PTX_TYPES types>(warp, op, mask, __VA_ARGS__); }
#define PTX_TYPES(...) __VA_ARGS__

// Integers -----------------------------------------------------------------------------------------------------------

template <class T>
T divided(T a, T b) {
  if (b == 0) return T(-1);  // the ISA leaves it open, and nothing traps
  if (std::is_signed_v<T> && b == T(-1)) return T(0) - std::make_unsigned_t<T>(a);
  return a / b;
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * b >> (8 * sizeof(T)));
}

// Instructions of one width whose names end in .s or .u.
template <class T>
void signed_or_unsigned(Table& table, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  DEFINE("add." + type, (T, T, T), [](T a, T b) { return T(U(a) + U(b)); });
  DEFINE("sub." + type, (T, T, T), [](T a, T b) { return T(U(a) - U(b)); });
  DEFINE("mul.lo." + type, (T, T, T), [](T a, T b) { return T(u64(U(a)) * U(b)); });
  DEFINE("mul.hi." + type, (T, T, T), high_product<T>);
  DEFINE("mad.lo." + type, (T, T, T, T), [](T a, T b, T c) { return T(u64(U(a)) * U(b) + U(c)); });
  DEFINE("mad.hi." + type, (T, T, T, T), [](T a, T b, T c) { return T(U(high_product(a, b)) + U(c)); });
  DEFINE("div." + type, (T, T, T), divided<T>);
  DEFINE("rem." + type, (T, T, T), remainder<T>);
  DEFINE("min." + type, (T, T, T), [](T a, T b) { return a < b ? a : b; });
  DEFINE("max." + type, (T, T, T), [](T a, T b) { return a > b ? a : b; });
  DEFINE("neg." + type, (T, T), [](T a) { return T(U(0) - U(a)); });
  DEFINE("abs." + type, (T, T), [](T a) { return a < 0 ? T(U(0) - U(a)) : a; });
  DEFINE("shr." + type, (T, T, u32), [](T a, u32 n) { return T(a >> std::min<u32>(n, 8 * sizeof(T) - 1)); });
  if (std::is_unsigned_v<T>) {
    DEFINE("shr." + type, (T, T, u32), [](T a, u32 n) { return n < 8 * sizeof(T) ? T(a >> n) : T(0); });
  }
  DEFINE("setp.lt." + type, (bool, T, T), std::less<T>());
  DEFINE("setp.le." + type, (bool, T, T), std::less_equal<T>());
  DEFINE("setp.gt." + type, (bool, T, T), std::greater<T>());
  DEFINE("setp.ge." + type, (bool, T, T), std::greater_equal<T>());
  if constexpr (sizeof(T) < 8) {
    using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, s32, u32>,
                                    std::conditional_t<std::is_signed_v<T>, s64, u64>>;
    using V = std::make_unsigned_t<Wide>;
    DEFINE("mul.wide." + type, (Wide, T, T), [](T a, T b) { return Wide(V(Wide(a)) * V(Wide(b))); });
    DEFINE("mad.wide." + type, (Wide, T, T, Wide), [](T a, T b, Wide c) { return Wide(V(Wide(a)) * V(Wide(b)) + V(c)); });
  }
}

// Instructions that take .b, and those that many types share.
template <class T>
void bits(Table& table, const std::string& width) {
  DEFINE("and.b" + width, (T, T, T), [](T a, T b) { return T(a & b); });
  DEFINE("or.b" + width, (T, T, T), [](T a, T b) { return T(a | b); });
  DEFINE("xor.b" + width, (T, T, T), [](T a, T b) { return T(a ^ b); });
  DEFINE("not.b" + width, (T, T), [](T a) { return T(~a); });
  DEFINE("shl.b" + width, (T, T, u32), [](T a, u32 n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
  DEFINE("shr.b" + width, (T, T, u32), [](T a, u32 n) { return n < 8 * sizeof(T) ? T(a >> n) : T(0); });
  for (const char* kind : {"b", "u", "s", "f"}) {
    DEFINE("mov." + (kind + width), (T, T), [](T a) { return a; });
    DEFINE("selp." + (kind + width), (T, T, T, bool), [](T a, T b, bool c) { return c ? a : b; });
    if (*kind == 'f') continue;
    DEFINE("setp.eq." + (kind + width), (bool, T, T), std::equal_to<T>());
    DEFINE("setp.ne." + (kind + width), (bool, T, T), std::not_equal_to<T>());
  }
}

u32 permuted(u32 a, u32 b, u32 selection) {
  const u64 both = a | u64(b) << 32;
  u32 found = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 choice = selection >> (4 * i);
    u8 byte = both >> (8 * (choice & 7));
    if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;
    found |= u32(byte) << (8 * i);
  }
  return found;
}

u32 any_logic(u32 a, u32 b, u32 c, u32 table) {
  u32 found = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return found;
}

// `count` bits of a from bit `first`; bits beyond the word are its sign, or 0.
template <class T>
T bit_field(T a, u32 first, u32 count) {
  first &= 0xFF, count &= 0xFF;
  if (count == 0) return 0;
  const u32 width = 8 * sizeof(T);
  const bool sign = std::is_signed_v<T> && (u64(a) >> std::min(first + count - 1, width - 1) & 1);
  u64 found = first < width ? u64(std::make_unsigned_t<T>(a)) >> first : 0;
  const u32 have = std::min(count, first < width ? width - first : 0);
  found = have < 64 ? found & ((u64(1) << have) - 1) : found;
  return T(sign && have < 64 ? found | ~u64(0) << have : found);
}

void single_integers(Table& table) {
  DEFINE("prmt.b32", (u32, u32, u32, u32), permuted);
  DEFINE("bfe.u32", (u32, u32, u32, u32), bit_field<u32>);
  DEFINE("bfe.s32", (s32, s32, u32, u32), bit_field<s32>);
  DEFINE("bfe.u64", (u64, u64, u32, u32), bit_field<u64>);
  DEFINE("bfe.s64", (s64, s64, u32, u32), bit_field<s64>);
  DEFINE("popc.b32", (u32, u32), [](u32 a) { return u32(std::popcount(a)); });
  DEFINE("clz.b32", (u32, u32), [](u32 a) { return u32(std::countl_zero(a)); });
  DEFINE("shf.l.wrap.b32", (u32, u32, u32, u32), [](u32 a, u32 b, u32 n) { return u32(((u64(b) << 32 | a) << (n & 31)) >> 32); });
  DEFINE("shf.r.wrap.b32", (u32, u32, u32, u32), [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); });
  DEFINE("shf.l.clamp.b32", (u32, u32, u32, u32), [](u32 a, u32 b, u32 n) {
    return n < 32 ? u32(((u64(b) << 32 | a) << n) >> 32) : a;
  });
  DEFINE("shf.r.clamp.b32", (u32, u32, u32, u32), [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> std::min<u32>(n, 32)); });
  DEFINE("and.pred", (bool, bool, bool), [](bool a, bool b) { return a && b; });
  DEFINE("or.pred", (bool, bool, bool), [](bool a, bool b) { return a || b; });
  DEFINE("xor.pred", (bool, bool, bool), [](bool a, bool b) { return a != b; });
  DEFINE("not.pred", (bool, bool), [](bool a) { return !a; });
  DEFINE("mov.pred", (bool, s64), [](s64 a) { return a != 0; });
  table["lop3.b32"] = [](Warp& warp, const Op& op, Mask mask) {
    const u32 logic = warp.in(op.operands[4])[0];
    map<u32, u32, u32, u32>(warp, op, mask, [=](u32 a, u32 b, u32 c) { return any_logic(a, b, c, logic); });
  };
}

// Floating point -----------------------------------------------------------------------------------------------------

template <class T>
T smaller(T a, T b) {  // a number where one of them is NaN, and -0 < +0
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

template <class T>
T larger(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class T>
void floating(Table& table, const std::string& type) {
  for (const char* rounding : {"", "rn."}) {
    DEFINE("add." + (rounding + type), (T, T, T), [](T a, T b) { return a + b; });
    DEFINE("sub." + (rounding + type), (T, T, T), [](T a, T b) { return a - b; });
    DEFINE("mul." + (rounding + type), (T, T, T), [](T a, T b) { return a * b; });
  }
  DEFINE("fma.rn." + type, (T, T, T, T), [](T a, T b, T c) { return std::fma(a, b, c); });
  DEFINE("div.rn." + type, (T, T, T), [](T a, T b) { return a / b; });
  DEFINE("sqrt.rn." + type, (T, T), [](T a) { return std::sqrt(a); });
  DEFINE("rcp.rn." + type, (T, T), [](T a) { return T(1) / a; });
  DEFINE("neg." + type, (T, T), [](T a) { return -a; });
  DEFINE("abs." + type, (T, T), [](T a) { return std::abs(a); });
  DEFINE("min." + type, (T, T, T), smaller<T>);
  DEFINE("max." + type, (T, T, T), larger<T>);
  DEFINE("min.NaN." + type, (T, T, T), [](T a, T b) { return a != a || b != b ? a + b : smaller(a, b); });
  DEFINE("max.NaN." + type, (T, T, T), [](T a, T b) { return a != a || b != b ? a + b : larger(a, b); });
  // A comparison is false where one of them is NaN; one whose name ends in u is true.
  DEFINE("setp.eq." + type, (bool, T, T), [](T a, T b) { return a == b; });
  DEFINE("setp.ne." + type, (bool, T, T), [](T a, T b) { return a < b || a > b; });
  DEFINE("setp.lt." + type, (bool, T, T), [](T a, T b) { return a < b; });
  DEFINE("setp.le." + type, (bool, T, T), [](T a, T b) { return a <= b; });
  DEFINE("setp.gt." + type, (bool, T, T), [](T a, T b) { return a > b; });
  DEFINE("setp.ge." + type, (bool, T, T), [](T a, T b) { return a >= b; });
  DEFINE("setp.equ." + type, (bool, T, T), [](T a, T b) { return !(a < b || a > b); });
  DEFINE("setp.neu." + type, (bool, T, T), [](T a, T b) { return a != b; });
  DEFINE("setp.ltu." + type, (bool, T, T), [](T a, T b) { return !(a >= b); });
  DEFINE("setp.leu." + type, (bool, T, T), [](T a, T b) { return !(a > b); });
  DEFINE("setp.gtu." + type, (bool, T, T), [](T a, T b) { return !(a <= b); });
  DEFINE("setp.geu." + type, (bool, T, T), [](T a, T b) { return !(a < b); });
  DEFINE("setp.num." + type, (bool, T, T), [](T a, T b) { return a == a && b == b; });
  DEFINE("setp.nan." + type, (bool, T, T), [](T a, T b) { return a != a || b != b; });
}

// What a GPU approximates. The result is `most` units of the last place beside the right one, up or down by its bits, so
// that nothing here is more exact than on a GPU.
float off(double right, int most) {
  float value = right;
  if (!std::isfinite(value) || value == 0 || value == 1) return value;
  const u32 chance = std::bit_cast<u32>(value) * 0x9E3779B1u >> 16;
  const int by = int(chance % (2 * most + 1)) - most;
  return std::bit_cast<float>(std::bit_cast<u32>(value) + by);
}

float flushed(float value) { return std::abs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value; }

void approximate(Table& table) {
  for (const char* flush : {"", "ftz."}) {
    const std::string end = std::string(flush) + "f32";
    DEFINE("rcp.approx." + end, (float, float), [](float a) { return flushed(off(1 / double(flushed(a)), 1)); });
    DEFINE("ex2.approx." + end, (float, float), [](float a) { return flushed(off(std::exp2(double(flushed(a))), 2)); });
    DEFINE("sqrt.approx." + end, (float, float), [](float a) { return flushed(off(std::sqrt(double(flushed(a))), 1)); });
    DEFINE("rsqrt.approx." + end, (float, float), [](float a) { return flushed(off(1 / std::sqrt(double(flushed(a))), 2)); });
    DEFINE("div.full." + end, (float, float, float), [](float a, float b) { return off(double(a) / b, 2); });
  }
}

// Conversions --------------------------------------------------------------------------------------------------------

// Floating point to integers: NaN is 0, what doesn't fit the nearest that does.
template <class To, class From>
To clamped(From value) {
  if (value != value) return 0;
  if (value < static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (value >= std::ldexp(From(1), std::numeric_limits<To>::digits)) return std::numeric_limits<To>::max();
  return static_cast<To>(value);
}

template <class To, class From>
void integer_to_integer(Table& table, const std::string& to, const std::string& from) {
  DEFINE("cvt." + to + "." + from, (To, From), [](From a) { return static_cast<To>(a); });
}

template <class From>
void from_integer(Table& table, const std::string& from) {
  integer_to_integer<s8, From>(table, "s8", from);
  integer_to_integer<u8, From>(table, "u8", from);
  integer_to_integer<s16, From>(table, "s16", from);
  integer_to_integer<u16, From>(table, "u16", from);
  integer_to_integer<s32, From>(table, "s32", from);
  integer_to_integer<u32, From>(table, "u32", from);
  integer_to_integer<s64, From>(table, "s64", from);
  integer_to_integer<u64, From>(table, "u64", from);
  DEFINE("cvt.rn.f32." + from, (float, From), [](From a) { return static_cast<float>(a); });
  DEFINE("cvt.rn.f64." + from, (double, From), [](From a) { return static_cast<double>(a); });
}

template <class To, class From>
void float_to_integer(Table& table, const std::string& to, const std::string& from) {
  DEFINE("cvt.rni." + to + "." + from, (To, From), [](From a) { return clamped<To>(std::nearbyint(a)); });
  DEFINE("cvt.rzi." + to + "." + from, (To, From), [](From a) { return clamped<To>(std::trunc(a)); });
  DEFINE("cvt.rmi." + to + "." + from, (To, From), [](From a) { return clamped<To>(std::floor(a)); });
  DEFINE("cvt.rpi." + to + "." + from, (To, From), [](From a) { return clamped<To>(std::ceil(a)); });
}

template <class From>
void from_floating(Table& table, const std::string& from) {
  float_to_integer<s32, From>(table, "s32", from);
  float_to_integer<u32, From>(table, "u32", from);
  float_to_integer<s64, From>(table, "s64", from);
  float_to_integer<u64, From>(table, "u64", from);
  DEFINE("cvt.rni." + from + "." + from, (From, From), [](From a) { return std::nearbyint(a); });
  DEFINE("cvt.rzi." + from + "." + from, (From, From), [](From a) { return std::trunc(a); });
  DEFINE("cvt.rmi." + from + "." + from, (From, From), [](From a) { return std::floor(a); });
  DEFINE("cvt.rpi." + from + "." + from, (From, From), [](From a) { return std::ceil(a); });
}

void conversions(Table& table) {
  from_integer<s8>(table, "s8"), from_integer<u8>(table, "u8");
  from_integer<s16>(table, "s16"), from_integer<u16>(table, "u16");
  from_integer<s32>(table, "s32"), from_integer<u32>(table, "u32");
  from_integer<s64>(table, "s64"), from_integer<u64>(table, "u64");
  from_floating<float>(table, "f32"), from_floating<double>(table, "f64");
  DEFINE("cvt.f64.f32", (double, float), [](float a) { return double(a); });
  DEFINE("cvt.rn.f32.f64", (float, double), [](double a) { return float(a); });
  DEFINE("cvt.rna.tf32.f32", (u32, float), to_tf32);
}

// Numbers of 16 bits, alone and in pairs ----------------------------------------------------------------------------------

float number(bf16 value) { return widened(value); }
float number(f16 value) { return value; }
template <class T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, bf16>) {
    return to_bf16(value);
  } else {
    return f16(value);
  }
}

// `value`, which was rounded, or its neighbour with odd bits: rounding that to fewer bits is as if it was the only one.
template <class T>
T to_odd(T value, bool inexact, bool too_large) {
  using Bits = std::conditional_t<sizeof(T) == 4, u32, u64>;
  Bits bits = std::bit_cast<Bits>(value);
  if (inexact) bits = (too_large ? bits - 1 : bits) | 1;
  return std::bit_cast<T>(bits);
}

template <class T>
T fused(T a, T b, T c) {
  const double product = double(number(a)) * number(b), term = number(c);
  double sum = product + term;
  if (std::isfinite(sum)) {
    const double part = sum - product, lost = (product - (sum - part)) + (term - part);
    sum = to_odd(sum, lost != 0, (lost < 0) == (sum > 0));
  }
  const float narrow = float(sum);
  if (!std::isfinite(narrow)) return rounded<T>(narrow);
  return rounded<T>(to_odd(narrow, double(narrow) != sum, std::abs(double(narrow)) > std::abs(sum)));
}

// float32 has more than twice the bits, so that rounding to it before does no harm.
template <class T>
T sum(T a, T b) {
  return rounded<T>(number(a) + number(b));
}
template <class T>
T difference(T a, T b) {
  return rounded<T>(number(a) - number(b));
}
template <class T>
T product(T a, T b) {
  return rounded<T>(number(a) * number(b));
}

template <class T>
struct Pair {
  T low, high;
};

// Integers of 16 bits, of which sm_90 has these in pairs.
template <class T>
void pair_of_integers(Table& table, const std::string& type) {
  using P = Pair<T>;
  DEFINE("add." + type, (P, P, P), [](P a, P b) { return P{T(u16(a.low) + u16(b.low)), T(u16(a.high) + u16(b.high))}; });
  DEFINE("min." + type, (P, P, P), [](P a, P b) { return P{std::min(a.low, b.low), std::min(a.high, b.high)}; });
  DEFINE("max." + type, (P, P, P), [](P a, P b) { return P{std::max(a.low, b.low), std::max(a.high, b.high)}; });
}

template <class T, T f(T, T)>
Pair<T> both(Pair<T> a, Pair<T> b) {
  return {f(a.low, b.low), f(a.high, b.high)};
}

template <class T>
void half(Table& table, const std::string& type) {
  using P = Pair<T>;
  const std::string pair = type + "x2";
  DEFINE("fma.rn." + type, (T, T, T, T), fused<T>);
  DEFINE("fma.rn." + pair, (P, P, P, P), [](P a, P b, P c) { return P{fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)}; });
  for (const char* rounding : {"", "rn."}) {
    DEFINE("add." + (rounding + type), (T, T, T), sum<T>);
    DEFINE("sub." + (rounding + type), (T, T, T), difference<T>);
    DEFINE("mul." + (rounding + type), (T, T, T), product<T>);
    DEFINE("add." + (rounding + pair), (P, P, P), both<T, sum<T>>);
    DEFINE("sub." + (rounding + pair), (P, P, P), both<T, difference<T>>);
    DEFINE("mul." + (rounding + pair), (P, P, P), both<T, product<T>>);
  }
  DEFINE("cvt.f32." + type, (float, T), [](T a) { return number(a); });
  DEFINE("cvt.f64." + type, (double, T), [](T a) { return double(number(a)); });
  DEFINE("cvt.rn." + type + ".f32", (T, float), rounded<T>);
  DEFINE("cvt.rn." + pair + ".f32", (P, float, float), [](float a, float b) { return P{rounded<T>(b), rounded<T>(a)}; });
}

// The parts of a register -----------------------------------------------------------------------------------------------

// Numbers: bits of a part, and how many parts. Operands: the parts and the whole; -1 (a constant) where one isn't wanted.
void unpack(Warp& warp, const Op& op, Mask mask) {
  const Lanes whole = warp.in(op.operands[op.count - 1]);
  const int width = op.numbers[0];
  for (int i = 0; i < op.numbers[1]; ++i) {
    if (op.operands[i] < 0) continue;
    Lanes part;
    for (int l = 0; l < kLanes; ++l) part[l] = whole[l] >> (i * width) & ((u64(1) << width) - 1);
    blend(warp.out(op.operands[i]), part, mask);
  }
}

void pack(Warp& warp, const Op& op, Mask mask) {
  Lanes whole{};
  const int width = op.numbers[0];
  for (int i = 0; i < op.numbers[1]; ++i) {
    const Lanes& part = warp.in(op.operands[1 + i]);
    for (int l = 0; l < kLanes; ++l) whole[l] |= (part[l] & ((u64(1) << width) - 1)) << (i * width);
  }
  blend(warp.out(op.operands[0]), whole, mask);
}

// Number: which special register.
void special(Warp& warp, const Op& op, Mask mask) {
  Lanes found;
  const Block& block = *warp.block;
  for (int l = 0; l < kLanes; ++l) {
    const u32 thread = warp.index * kLanes + l, axis = op.numbers[0] & 3;
    switch (op.numbers[0] >> 2) {
      case 0: found[l] = axis == 0 ? thread : 0; break;               // tid
      case 1: found[l] = axis == 0 ? block.warps * kLanes : 1; break;  // ntid
      case 2: found[l] = block.place[axis]; break;                     // ctaid
      case 3: found[l] = block.grid[axis]; break;                      // nctaid
      default: found[l] = l;                                           // laneid
    }
  }
  blend(warp.out(op.operands[0]), found, mask);
}

// Memory ----------------------------------------------------------------------------------------------------------------

template <class F>
void each_lane(Warp& warp, Mask mask, F f) {
  for (int l = 0; l < kLanes; ++l) {
    if (mask >> l & 1) f(warp.lane = l);
  }
}

// Numbers: bytes of an element (negative where its sign is kept), offset. Operands: registers, and the address.
template <bool shared>
void load(Warp& warp, const Op& op, Mask mask) {
  const int size = std::abs(op.numbers[0]), count = op.count - 1;
  const Lanes addresses = warp.in(op.operands[count]);
  each_lane(warp, mask, [&](int l) {
    const u64 address = (shared ? u32(addresses[l]) : addresses[l]) + op.numbers[1];
    u8 bytes[32];
    (shared ? warp.block->shared : warp.block->global)->at(address, size * count).read(address, size * count, bytes, warp.now(l));
    for (int i = 0; i < count; ++i) {
      u64 value = 0;
      memcpy(&value, bytes + i * size, size);
      if (op.numbers[0] < 0) value = s64(value << (64 - 8 * size)) >> (64 - 8 * size);
      warp.out(op.operands[i])[l] = value;
    }
  });
}

template <bool shared>
void store(Warp& warp, const Op& op, Mask mask) {
  const int size = std::abs(op.numbers[0]), count = op.count - 1;
  const Lanes& addresses = warp.in(op.operands[count]);
  each_lane(warp, mask, [&](int l) {
    const u64 address = (shared ? u32(addresses[l]) : addresses[l]) + op.numbers[1];
    u8 bytes[32];
    for (int i = 0; i < count; ++i) memcpy(bytes + i * size, &warp.in(op.operands[i])[l], size);
    (shared ? warp.block->shared : warp.block->global)->at(address, size * count).write(address, size * count, bytes, warp.now(l));
  });
}

// Numbers: bytes, offset of the target, offset of the source. Operands: target, source, and how many bytes are read.
void copy_async(Warp& warp, const Op& op, Mask mask) {
  const Lanes &to = warp.in(op.operands[0]), &from = warp.in(op.operands[1]), &count = warp.in(op.operands[2]);
  each_lane(warp, mask, [&](int l) {
    const int size = op.numbers[0];
    const Copy copy{u32(to[l]) + u64(op.numbers[1]), from[l] + op.numbers[2], size, int(u32(count[l])), warp.block->epoch};
    if (copy.count < 0 || copy.count > size) throw std::runtime_error("copies more bytes than it says");
    warp.block->shared->at(copy.to, size).expect(copy.to, size, warp.now(l));
    if (copy.count) {
      u8 bytes[16];
      warp.block->global->at(copy.from, size).read(copy.from, copy.count, bytes, warp.now(l));
    }
    warp.groups[l].back().push_back(copy);
  });
}

void commit_copies(Warp& warp, const Op&, Mask mask) {
  each_lane(warp, mask, [&](int l) { warp.groups[l].emplace_back(); });
}

// All groups but the last `most` arrive. What they bring is read only now: as late as a GPU may.
void wait_for_copies(Warp& warp, Mask mask, size_t most) {
  each_lane(warp, mask, [&](int l) {
    auto& groups = warp.groups[l];
    const size_t closed = groups.size() - 1, arriving = closed > most ? closed - most : 0;
    for (size_t g = 0; g < arriving; ++g) {
      for (const Copy& copy : groups[g]) {
        u8 bytes[16] = {};
        if (copy.count) {
          Region& source = warp.block->global->at(copy.from, copy.size);
          source.check_unchanged(copy.from, copy.count, copy.since);
          source.read(copy.from, copy.count, bytes, warp.now(l));
        }
        warp.block->shared->at(copy.to, copy.size).arrive(copy.to, copy.size, bytes, warp.now(l));
      }
    }
    groups.erase(groups.begin(), groups.begin() + arriving);
  });
}

// Whole warps -----------------------------------------------------------------------------------------------------------

void need_all_lanes(Warp& warp, Mask mask, u32 members) {
  if ((members & warp.alive) != mask) throw std::runtime_error("not all lanes of the warp come to this together");
}

// Numbers: rows of matrices are read (0) or columns (1). Operands: one register a matrix, and the address.
void load_matrices(Warp& warp, const Op& op, Mask mask) {
  need_all_lanes(warp, mask, kAllLanes);
  const int count = op.count - 1;
  const Lanes addresses = warp.in(op.operands[count]);
  for (int m = 0; m < count; ++m) {
    u16 matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const int l = warp.lane = 8 * m + row;
      const u64 address = u32(addresses[l]) + op.numbers[1];
      warp.block->shared->at(address, 16).read(address, 16, matrix[row], warp.now(l));
    }
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      warp.out(op.operands[m])[l] = op.numbers[0] ? matrix[column][row] | u32(matrix[column + 1][row]) << 16
                                                  : matrix[row][column] | u32(matrix[row][column + 1]) << 16;
    }
  }
}

// The same the other way round.
void store_matrices(Warp& warp, const Op& op, Mask mask) {
  need_all_lanes(warp, mask, kAllLanes);
  const int count = op.count - 1;
  const Lanes& addresses = warp.in(op.operands[count]);
  for (int m = 0; m < count; ++m) {
    u16 matrix[8][8];
    const Lanes& parts = warp.in(op.operands[m]);
    for (int l = 0; l < kLanes; ++l) {
      for (int half = 0; half < 2; ++half) {
        const int row = l / 4, column = l % 4 * 2 + half;
        (op.numbers[0] ? matrix[column][row] : matrix[row][column]) = parts[l] >> (16 * half);
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int l = warp.lane = 8 * m + row;
      const u64 address = u32(addresses[l]) + op.numbers[1];
      warp.block->shared->at(address, 16).write(address, 16, matrix[row], warp.now(l));
    }
  }
}

// D = A B + C with 16 x 8 sums in float32, in the order of the inner dimension. `number(register, part)` reads a number.
// Operands: 4 of D, 4 of A, 2 of B, 4 of C. Each register of A and B holds `kPacked` numbers of the inner dimension.
template <int kPacked, class Number>
void multiply_matrices(Warp& warp, const Op& op, Mask mask, Number number) {
  need_all_lanes(warp, mask, kAllLanes);
  constexpr int kDepth = 8 * kPacked;
  float a[16][kDepth], b[kDepth][8];
  Lanes d[4];
  for (int l = 0; l < kLanes; ++l) {
    const int group = l / 4, k = l % 4 * kPacked;
    for (int i = 0; i < 4; ++i) {
      for (int p = 0; p < kPacked; ++p) {
        a[group + i % 2 * 8][k + i / 2 * 4 * kPacked + p] = number(u32(warp.in(op.operands[4 + i])[l]), p);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int p = 0; p < kPacked; ++p) {
        b[k + i * 4 * kPacked + p][group] = number(u32(warp.in(op.operands[8 + i])[l]), p);
      }
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = as<float>(warp.in(op.operands[10 + i])[l]);
      for (int k = 0; k < kDepth; ++k) sum = std::fma(a[row][k], b[k][column], sum);
      d[i][l] = bits_of(sum);
    }
  }
  for (int i = 0; i < 4; ++i) warp.out(op.operands[i]) = d[i];
}

// Operands: result, value, lane or distance, clamp and segment, members.
template <class Source>
void shuffle(Warp& warp, const Op& op, Mask mask, Source source) {
  const Lanes a = warp.in(op.operands[1]), b = warp.in(op.operands[2]), c = warp.in(op.operands[3]);
  Lanes found;
  need_all_lanes(warp, mask, u32(warp.in(op.operands[4])[warp.lane]));
  each_lane(warp, mask, [&](int l) {
    const int clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int from = source(l, int(b[l] & 31), (l & segment) | (clamp & ~segment), l & segment, segment);
    if (!(mask >> from & 1)) throw std::runtime_error("takes a number from a lane that isn't there");
    found[l] = u32(a[from]);
  });
  blend(warp.out(op.operands[0]), found, mask);
}

// A parameter of the kernel by its address. Numbers are the bytes of each, and how many there are.
void load_parameter(Warp& warp, const Op& op, Mask mask) {
  const Lanes& address = warp.in(op.operands[1]);
  Lanes found;
  each_lane(warp, mask, [&](int l) {
    const u32 at = u32(address[l]), bytes = op.numbers[0];
    if (at % bytes != 0 || at / bytes >= op.numbers[1]) throw std::runtime_error("no parameter lies there");
    found[l] = warp.block->program->constants[at / bytes][l];
  });
  blend(warp.out(op.operands[0]), found, mask);
}

void across_lanes(Table& table) {
  table["shfl.sync.bfly.b32"] = [](Warp& warp, const Op& op, Mask mask) {
    shuffle(warp, op, mask, [](int l, int b, int last, int, int) { return (l ^ b) <= last ? l ^ b : l; });
  };
  table["shfl.sync.idx.b32"] = [](Warp& warp, const Op& op, Mask mask) {
    shuffle(warp, op, mask, [](int l, int b, int last, int first, int segment) {
      const int from = first | (b & ~segment & 31);
      return from <= last ? from : l;
    });
  };
  table["shfl.sync.up.b32"] = [](Warp& warp, const Op& op, Mask mask) {
    shuffle(warp, op, mask, [](int l, int b, int last, int, int) { return l - b >= last ? l - b : l; });
  };
  table["shfl.sync.down.b32"] = [](Warp& warp, const Op& op, Mask mask) {
    shuffle(warp, op, mask, [](int l, int b, int last, int, int) { return l + b <= last ? l + b : l; });
  };
  table["bar.warp.sync"] = [](Warp& warp, const Op& op, Mask mask) {
    need_all_lanes(warp, mask, u32(warp.in(op.operands[0])[warp.lane]));
    ++warp.turn;
  };
}

// Products of warpgroups (sm_90) ----------------------------------------------------------------------------------------

enum ProductFlags { kBfloat16 = 1, kTransposedA = 2, kTransposedB = 4 };

// The address of number (n, k) of a matrix that a descriptor says where it lies. Rows of n lie side by side along k, or
// transposed, rows of k along n; both are swizzled: of each 16 bytes, the place in the row is XORed with the row's number.
u64 place_in_matrix(u64 descriptor, int n, int k, int size, bool transposed) {
  const u64 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const int mode = descriptor >> 62, width = 256 >> mode;  // 128, 64 or 32 bytes
  if (mode == 0 || (descriptor >> 49 & 7)) throw std::runtime_error("a descriptor without a swizzle, or with an offset, isn't understood");
  const int in_row = width / size;
  const u64 plain = transposed ? start + n / in_row * leading + k / 8 * stride + k % 8 * width + n % in_row * size
                               : start + n / 8 * stride + n % 8 * width + k * size;
  return plain ^ (plain >> 7 & (width / 16 - 1)) << 4;
}

float number_in_matrix(Warp& warp, u64 descriptor, int n, int k, int flags, bool transposed, u32 since) {
  const int size = flags & kBfloat16 ? 2 : 4;
  const u64 address = place_in_matrix(descriptor, n, k, size, transposed);
  Region& region = warp.block->shared->at(address, size);
  region.check_unchanged(address, size, since);
  u32 bits = 0;
  region.read(address, size, &bits, warp.now(warp.lane));
  return size == 2 ? widened({u16(bits)}) : std::bit_cast<float>(bits & 0xFFFFE000u);
}

// A warp's 16 rows of the product.
void multiply(Warp& warp, const Product& product, bool keep) {
  const Op& op = *product.op;
  const int columns = op.numbers[0] * 2, flags = op.numbers[2], packed = flags & kBfloat16 ? 2 : 1, depth = 8 * packed;
  std::vector<float> a(16 * depth), b(depth * columns);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      if (op.numbers[1] == 1) {
        a[row * depth + k] = number_in_matrix(warp, product.a_place, warp.index % 4 * 16 + row, k, flags, flags & kTransposedA, product.since);
      } else {
        const u32 bits = product.a[row / 8 + k / (4 * packed) * 2][row % 8 * 4 + k / packed % 4];
        a[row * depth + k] = packed == 2 ? widened({u16(bits >> (16 * (k % 2)))}) : std::bit_cast<float>(bits & 0xFFFFE000u);
      }
    }
  }
  for (int k = 0; k < depth; ++k) {
    for (int n = 0; n < columns; ++n) b[k * columns + n] = number_in_matrix(warp, product.b_place, n, k, flags, flags & kTransposedB, product.since);
  }
  if (!keep) return;
  for (int l = 0; l < kLanes; ++l) {
    for (int i = 0; i < op.numbers[0]; ++i) {
      const int row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      float sum = product.adds ? as<float>(warp.out(op.operands[i])[l]) : 0.0f;
      for (int k = 0; k < depth; ++k) sum = std::fma(a[row * depth + k], b[k * columns + column], sum);
      warp.out(op.operands[i])[l] = bits_of(sum);
    }
  }
}

// Numbers: registers of D, operands of A (4 registers or a descriptor), flags. Operands: D, A, B, whether D is added to.
void begin_product(Warp& warp, const Op& op, Mask mask) {
  need_all_lanes(warp, mask, kAllLanes);
  const int first = op.numbers[0], after = first + op.numbers[1];
  Product product{&op, {}, 0, warp.in(op.operands[after])[0], (warp.in(op.operands[after + 1])[0] & 1) != 0, warp.block->epoch};
  for (int i = 0; i < op.numbers[1]; ++i) product.a[i] = warp.in(op.operands[first + i]);
  product.a_place = product.a[0][0];
  multiply(warp, product, false);  // may be read from now on
  warp.products.back().push_back(product);
}

// Sums arrive as late as they may.
void wait_for_products(Warp& warp, const Op& op, Mask mask) {
  need_all_lanes(warp, mask, kAllLanes);
  const size_t most = op.numbers[0], closed = warp.products.size() - 1, arriving = closed > most ? closed - most : 0;
  for (size_t g = 0; g < arriving; ++g) {
    for (const Product& product : warp.products[g]) multiply(warp, product, true);
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + arriving);
}

template <class T, class F>
void reduce(Warp& warp, const Op& op, Mask mask, F f) {
  need_all_lanes(warp, mask, u32(warp.in(op.operands[2])[warp.lane]));
  const Lanes& a = warp.in(op.operands[1]);
  T total = as<T>(a[warp.lane]);
  for (int l = warp.lane + 1; l < kLanes; ++l) {
    if (mask >> l & 1) total = f(total, as<T>(a[l]));
  }
  Lanes found;
  found.fill(bits_of<T>(total));
  blend(warp.out(op.operands[0]), found, mask);
}

template <class T>
void reductions(Table& table, const std::string& type) {
  table["redux.sync.add." + type] = [](Warp& warp, const Op& op, Mask mask) {
    reduce<T>(warp, op, mask, [](T a, T b) { return T(u32(a) + u32(b)); });
  };
  table["redux.sync.min." + type] = [](Warp& warp, const Op& op, Mask mask) {
    reduce<T>(warp, op, mask, [](T a, T b) { return std::min(a, b); });
  };
  table["redux.sync.max." + type] = [](Warp& warp, const Op& op, Mask mask) {
    reduce<T>(warp, op, mask, [](T a, T b) { return std::max(a, b); });
  };
}

Table whole_table() {
  Table table;
  signed_or_unsigned<s16>(table, "s16"), signed_or_unsigned<u16>(table, "u16"), bits<u16>(table, "16");
  signed_or_unsigned<s32>(table, "s32"), signed_or_unsigned<u32>(table, "u32"), bits<u32>(table, "32");
  signed_or_unsigned<s64>(table, "s64"), signed_or_unsigned<u64>(table, "u64"), bits<u64>(table, "64");
  single_integers(table);
  floating<float>(table, "f32"), floating<double>(table, "f64");
  approximate(table), conversions(table), half<bf16>(table, "bf16"), half<f16>(table, "f16");
  pair_of_integers<s16>(table, "s16x2"), pair_of_integers<u16>(table, "u16x2");
  across_lanes(table), reductions<s32>(table, "s32"), reductions<u32>(table, "u32");
  table["pack"] = pack, table["unpack"] = unpack, table["special"] = special;
  table["load.global"] = load<false>, table["load.shared"] = load<true>;
  table["load.param"] = load_parameter;
  table["store.global"] = store<false>, table["store.shared"] = store<true>;
  table["cp.async"] = copy_async, table["cp.async.commit_group"] = commit_copies;
  table["cp.async.wait_group"] = [](Warp& warp, const Op& op, Mask mask) { wait_for_copies(warp, mask, op.numbers[0]); };
  table["cp.async.wait_all"] = [](Warp& warp, const Op& op, Mask mask) {
    commit_copies(warp, op, mask);
    wait_for_copies(warp, mask, 0);
  };
  table["ldmatrix"] = load_matrices, table["stmatrix"] = store_matrices;
  table["wgmma.mma_async"] = begin_product, table["wgmma.wait_group.sync.aligned"] = wait_for_products;
  table["wgmma.commit_group.sync.aligned"] = [](Warp& warp, const Op&, Mask mask) {
    need_all_lanes(warp, mask, kAllLanes);
    warp.products.emplace_back();
  };
  // Whether these are missing is not found: shared memory has no second way to it here.
  for (const char* fence : {"wgmma.fence.sync.aligned", "fence.proxy.async.shared::cta"}) table[fence] = [](Warp&, const Op&, Mask) {};
  // Launches follow one another here.
  for (const char* order : {"griddepcontrol.wait", "griddepcontrol.launch_dependents"}) table[order] = [](Warp&, const Op&, Mask) {};
  table["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = [](Warp& warp, const Op& op, Mask mask) {
    multiply_matrices<2>(warp, op, mask, [](u32 bits, int p) { return widened({u16(bits >> (16 * p))}); });
  };
  table["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = [](Warp& warp, const Op& op, Mask mask) {
    multiply_matrices<1>(warp, op, mask, [](u32 bits, int) { return std::bit_cast<float>(bits & 0xFFFFE000u); });
  };
  return table;
}

}  // namespace

Handler handler_of(const std::string& name) {
  static const Table table = whole_table();
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace ptx
