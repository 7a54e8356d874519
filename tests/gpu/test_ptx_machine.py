"""The machine that runs PTX on the CPU does what the PTX ISA says, and finds what a kernel must not do."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.gpu.ptx import machine
from tests.gpu.ptx.assembler import PtxError
from tests.gpu.ptx.lanes import bits32, each_lane, from_bits, kernel, run, signed, to_bits

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=machine.missing() or "")

NAN, INF = 0x7FFFFFFF, 0x7F800000

# Integers -------------------------------------------------------------------------------------------------------------

EDGES = (
    0,
    1,
    2,
    7,
    31,
    32,
    33,
    63,
    64,
    255,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x123456789ABCDEF0,
)


def values(width: int, count: int, seed: int) -> list[int]:
    """Numbers of so many bits, at their edges, small and anywhere."""
    rng = random.Random(seed)
    kinds = (
        lambda: rng.choice(EDGES),
        lambda: -rng.choice(EDGES),
        lambda: rng.getrandbits(width),
        lambda: rng.randrange(70),
    )
    return [rng.choice(kinds)() & (2**width - 1) for _ in range(count)]


def bit_field(a: int, b: int, c: int, width: int, is_signed: bool) -> int:
    """As the ISA writes it down for bfe."""
    place, count, top = b & 0xFF, c & 0xFF, width - 1
    sign = 0 if not is_signed or count == 0 else a >> min(place + count - 1, top) & 1
    bits = [(a >> (place + i) & 1 if i < count and place + i <= top else sign) for i in range(width)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, c: int) -> int:
    whole, found = (b << 32 | a).to_bytes(8, "little"), []
    for i in range(4):
        choice = c >> (4 * i) & 15
        byte = whole[choice & 7]
        found.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def truncated(a: int, b: int) -> int:
    """C's division."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integer_instructions(w: int) -> dict[str, Callable[..., int]]:
    """What is the same in all widths, of numbers given without a sign."""

    def s(function: Callable[..., int]) -> Callable[..., int]:
        return lambda *numbers: function(*(signed(n, w) for n in numbers))

    found: dict[str, Callable[..., int]] = {
        f"add.s{w}": lambda a, b: a + b,
        f"sub.u{w}": lambda a, b: a - b,
        f"mul.lo.s{w}": lambda a, b: a * b,
        f"mul.hi.s{w}": s(lambda a, b: a * b >> w),
        f"mul.hi.u{w}": lambda a, b: a * b >> w,
        f"mad.lo.u{w}": lambda a, b, c: a * b + c,
        f"min.s{w}": s(min),
        f"max.u{w}": max,
        f"neg.s{w}": lambda a: -a,
        f"abs.s{w}": s(abs),
        f"and.b{w}": lambda a, b: a & b,
        f"or.b{w}": lambda a, b: a | b,
        f"xor.b{w}": lambda a, b: a ^ b,
        f"not.b{w}": lambda a: ~a,
    }
    return found


def single_instructions() -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {
        "prmt.b32": permuted,
        "bfe.u32": lambda a, b, c: bit_field(a, b, c, 32, False),
        "bfe.s32": lambda a, b, c: bit_field(a, b, c, 32, True),
        "shf.l.wrap.b32": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
        "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
        "shf.l.clamp.b32": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
        "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
        "popc.b32": lambda a: a.bit_count(),
        "clz.b32": lambda a: 32 - a.bit_length(),
    }
    return found


def assert_integers(name: str, wanted: Callable[..., int], width: int, result: int = 0, **given: list[int]) -> None:
    count = wanted.__code__.co_argcount if hasattr(wanted, "__code__") and wanted.__code__.co_argcount else 0
    count = count or (1 if name.split(".")[0] in ("abs", "neg", "not") else 2)
    result = result or width
    inputs = [given.get(letter) or values(width, 160, seed) for seed, letter in enumerate("abc"[:count])]
    found = each_lane(
        f"{name} %d, {', '.join(f'%{letter}' for letter in 'abc'[:count])};", result, *((width, i) for i in inputs)
    )
    for ours, *numbers in zip(found, *inputs, strict=True):
        assert ours == wanted(*numbers) & (2**result - 1), (name, [hex(n) for n in numbers])


@pytest.mark.parametrize("width", [16, 32, 64])
def test_integers(width):
    for name, wanted in integer_instructions(width).items():
        assert_integers(name, wanted, width)


def test_single_integer_instructions():
    for name, wanted in single_instructions().items():
        assert_integers(name, wanted, 32)


@pytest.mark.parametrize("width", [16, 32])
def test_wide_products(width):
    assert_integers(f"mul.wide.u{width}", lambda a, b: a * b, width, 2 * width)
    assert_integers(f"mul.wide.s{width}", lambda a, b: signed(a, width) * signed(b, width), width, 2 * width)
    a, b, c = values(width, 64, 1), values(width, 64, 2), values(2 * width, 64, 3)
    found = each_lane(f"mad.wide.s{width} %d, %a, %b, %c;", 2 * width, (width, a), (width, b), (2 * width, c))
    wanted = [signed(x, width) * signed(y, width) + z for x, y, z in zip(a, b, c, strict=True)]
    assert found == [number % 4**width for number in wanted]


@pytest.mark.parametrize(("name", "of"), [("s16x2", lambda n: signed(n, 16)), ("u16x2", lambda n: n)])
def test_pairs_of_integers(name, of):
    a, b = values(32, 160, 1), values(32, 160, 2)
    for what, function in (("add", lambda x, y: x + y), ("min", min), ("max", max)):
        found = each_lane(f"{what}.{name} %d, %a, %b;", 32, (32, a), (32, b))
        for ours, x, y in zip(found, a, b, strict=True):
            for shift in (0, 16):
                wanted = function(of(x >> shift & 0xFFFF), of(y >> shift & 0xFFFF))
                assert ours >> shift & 0xFFFF == wanted & 0xFFFF


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_stop_at_the_width(width):
    a, n = values(width, 160, 1), [value % 70 for value in values(32, 160, 2)]
    for name, wanted in (
        (f"shl.b{width}", lambda a, n: a << n),
        (f"shr.u{width}", lambda a, n: a >> n),
        (f"shr.s{width}", lambda a, n: signed(a, width) >> n),
    ):
        found = each_lane(f"{name} %d, %a, %b;", width, (width, a), (32, n))
        assert found == [wanted(x, y) & (2**width - 1) for x, y in zip(a, n, strict=True)]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_division(width):
    a, b = values(width, 160, 1), [value or 3 for value in values(width, 160, 2)]
    for name, of in (("u", lambda n: n), ("s", lambda n: signed(n, width))):
        for what in ("div", "rem"):
            found = each_lane(f"{what}.{name}{width} %d, %a, %b;", width, (width, a), (width, b))
            for ours, x, y in zip(found, map(of, a), map(of, b), strict=True):
                wanted = truncated(x, y)
                assert ours == (wanted if what == "div" else x - y * wanted) & (2**width - 1)


def test_logic_of_three():
    a, b, c = (values(32, 32, seed) for seed in range(3))
    for table in (0x96, 0xE8, 0x40, 0xFE):
        found = each_lane(f"lop3.b32 %d, %a, %b, %c, {table:#x};", 32, (32, a), (32, b), (32, c))
        for ours, *numbers in zip(found, a, b, c, strict=True):
            for i in range(32):
                index = sum((number >> i & 1) << k for number, k in zip(numbers, (2, 1, 0), strict=True))
                assert ours >> i & 1 == table >> index & 1


def test_comparisons_and_choices():
    a, b = [*values(32, 64, 1), 5], [*values(32, 64, 2), 5]
    for name, holds in (
        ("lt.s32", lambda x, y: signed(x, 32) < signed(y, 32)),
        ("ge.u32", lambda x, y: x >= y),
        ("eq.b32", lambda x, y: x == y),
        ("ne.s32", lambda x, y: x != y),
    ):
        body = f"setp.{name} %p1, %a, %b; selp.b32 %r5, %a, %b, %p1; not.pred %p2, %p1;"
        body += "@%p2 add.s32 %r5, %r5, 1; mov.b32 %d, %r5;"
        found = each_lane(body, 32, (32, a), (32, b))
        assert found == [x if holds(x, y) else (y + 1) % 2**32 for x, y in zip(a, b, strict=True)]
    body = "setp.gt.u32 %p1, %a, 9; setp.lt.and.u32 %p1, %a, %b, %p1; selp.b32 %d, 1, 0, %p1;"
    assert each_lane(body, 32, (32, a), (32, b)) == [int(9 < x < y) for x, y in zip(a, b, strict=True)]


def test_parts_of_registers():
    a = values(64, 32, 1)
    assert each_lane("mov.b64 {%r1, %r2}, %a; mov.b64 %d, {%r2, %r1};", 64, (64, a)) == [
        x >> 32 | x % 2**32 << 32 for x in a
    ]
    assert each_lane("mov.b64 {_, %r1}, %a; mov.b32 %d, %r1;", 32, (64, a)) == [x >> 32 for x in a]
    body = "mov.b64 {%h1, %h2, %h3, %h4}, %a; mov.b32 %d, {%h4, %h2};"
    assert each_lane(body, 32, (64, a)) == [x >> 48 | (x >> 16 & 0xFFFF) << 16 for x in a]


def test_integers_change_their_width():
    a = values(32, 64, 1)
    assert each_lane("cvt.s64.s32 %d, %a;", 64, (32, a)) == [signed(x, 32) % 2**64 for x in a]
    assert each_lane("cvt.u64.u32 %d, %a;", 64, (32, a)) == a
    assert each_lane("cvt.u16.u32 %h1, %a; cvt.s16.s8 %h2, %h1; cvt.s32.s16 %d, %h2;", 32, (32, a)) == [
        signed(x, 8) % 2**32 for x in a
    ]


# Floating point -------------------------------------------------------------------------------------------------------

FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    3.0,
    1e-40,
    -1e-45,
    1e38,
    -3e38,
    2.0**-126,
    16777217.0,
    float("inf"),
    -float("inf"),
    float("nan"),
]


def floats(count: int, seed: int) -> list[float]:
    rng = random.Random(seed)
    kinds = (
        lambda: rng.choice(FLOATS),
        lambda: rng.gauss(0, 1),
        lambda: rng.gauss(0, 1) * 2.0 ** rng.randrange(-126, 127),
    )
    return [float(np.float32(rng.choice(kinds)())) for _ in range(count)]


def same_floats(found: list[int], wanted: np.ndarray) -> None:
    """Bit for bit, with one NaN for all."""
    for ours, theirs in zip(found, wanted.astype(np.float32), strict=True):
        assert ours == (NAN if np.isnan(theirs) else bits32(theirs)), (hex(ours), theirs)


@np.errstate(all="ignore")
def test_float_arithmetic():
    a, b = np.float32(floats(320, 1)), np.float32(floats(320, 2))
    inputs = [(32, [bits32(x) for x in column]) for column in (a, b)]
    for name, wanted in (
        ("add.f32", a + b),
        ("sub.rn.f32", a - b),
        ("mul.rn.f32", a * b),
        ("div.rn.f32", a / b),
        ("min.f32", np.where(np.isnan(a) | (b < a) | ((a == b) & np.signbit(b)), b, a)),
        ("max.f32", np.where(np.isnan(a) | (b > a) | ((a == b) & np.signbit(a)), b, a)),
    ):
        same_floats(each_lane(f"{name} %d, %a, %b;", 32, *inputs), wanted)
    for name, wanted in (
        ("sqrt.rn.f32", np.sqrt(a)),
        ("rcp.rn.f32", np.float32(1) / a),
        ("neg.f32", -a),
        ("abs.f32", np.abs(a)),
    ):
        same_floats(each_lane(f"{name} %d, %a;", 32, inputs[0]), wanted)


def test_fused_multiply_add_rounds_once():
    rng = random.Random(3)
    numbers = [np.float32(x) for x in (1 + 2.0**-12, 1 + 2.0**-23, -1.0, 2.0**-24, 3.0, 1 / 3, -(2.0**-60), 2.0**-140)]
    a, b, c = ([rng.choice(numbers) for _ in range(320)] for _ in range(3))
    found = each_lane("fma.rn.f32 %d, %a, %b, %c;", 32, *((32, [bits32(x) for x in column]) for column in (a, b, c)))
    for ours, x, y, z in zip(found, a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert ours == (to_bits(exact, 23, 8) if exact else 0)


@pytest.mark.parametrize(("name", "mantissa", "exponent"), [("bf16", 7, 8), ("f16", 10, 5)])
def test_numbers_of_16_bits(name, mantissa, exponent):
    rng = random.Random(4)
    most = 2**exponent - 2

    def made() -> int:
        power = rng.choice((0, 1, most // 2, most // 2 + 1, most // 2 - mantissa, rng.randrange(most)))
        return (
            rng.getrandbits(1) << 15
            | power << mantissa
            | rng.choice((0, 1, 2**mantissa - 1, rng.getrandbits(mantissa)))
        )

    a, b, c = ([made() for _ in range(640)] for _ in range(3))
    exact = [[Fraction(from_bits(bits, mantissa, exponent)) for bits in column] for column in (a, b, c)]
    whole = [[low | high << 16 for low, high in zip(column[::2], column[1::2], strict=True)] for column in (a, b, c)]
    for instruction, wanted in (
        ("fma.rn.{} %d, %a, %b, %c;", lambda x, y, z: x * y + z),
        ("add.rn.{} %d, %a, %b;", lambda x, y, z: x + y),
        ("sub.{} %d, %a, %b;", lambda x, y, z: x - y),
        ("mul.{} %d, %a, %b;", lambda x, y, z: x * y),
    ):
        inputs = 3 if "%c" in instruction else 2
        found = each_lane(instruction.format(name), 16, *((16, column) for column in (a, b, c)[:inputs]))
        pairs = each_lane(instruction.format(name + "x2"), 32, *((32, column) for column in whole[:inputs]))
        assert found == [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
        for ours, *numbers in zip(found, *exact, strict=True):
            right = wanted(*numbers)
            assert ours == to_bits(right, mantissa, exponent) if right else ours & 0x7FFF == 0


def test_what_is_far_below_breaks_a_tie():
    """A product halfway between two numbers, and a term that float64 would lose beside it."""
    tiny = [1 << 7, 1 << 7 | 1 << 15]  # 2^-126 and its negative
    found = each_lane("fma.rn.bf16 %d, %a, %b, %c;", 16, (16, [0x3F81] * 2), (16, [0x3FC0] * 2), (16, tiny))
    assert found == [0x3FC2, 0x3FC1]


def test_a_comparison_with_nan_is_false_but_where_its_name_ends_in_u():
    nan, one = bits32(float("nan")), bits32(1.0)
    a, b = [nan, one, one, one], [one, nan, one, bits32(2.0)]
    for name, wanted in {
        "eq": [0, 0, 1, 0],
        "ne": [0, 0, 0, 1],
        "lt": [0, 0, 0, 1],
        "le": [0, 0, 1, 1],
        "gt": [0, 0, 0, 0],
        "ge": [0, 0, 1, 0],
        "equ": [1, 1, 1, 0],
        "neu": [1, 1, 0, 1],
        "ltu": [1, 1, 0, 1],
        "leu": [1, 1, 1, 1],
        "gtu": [1, 1, 0, 0],
        "geu": [1, 1, 1, 0],
        "num": [0, 0, 1, 1],
        "nan": [1, 1, 0, 0],
    }.items():
        found = each_lane(f"setp.{name}.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", 32, (32, a), (32, b))
        assert found == wanted, name


def test_approximations_keep_within_what_the_isa_allows_and_are_not_exact():
    a = [x for x in floats(400, 5) if 1e-30 < abs(x) < 1e30]
    inputs = (32, [bits32(x) for x in a])
    found = np.array(each_lane("rcp.approx.ftz.f32 %d, %a;", 32, inputs), dtype=np.uint32).view(np.float32)
    exact = 1 / np.float64(a)
    assert np.all(np.abs(found / exact - 1) <= 2.0**-22)
    assert np.any(found != exact.astype(np.float32))
    a = [x for x in floats(400, 6) if abs(x) < 100]
    found = np.array(each_lane("ex2.approx.f32 %d, %a;", 32, (32, [bits32(x) for x in a])), dtype=np.uint32).view(
        np.float32
    )
    exact = np.exp2(np.float64(a))
    assert np.all(np.abs(found / exact - 1) <= 2.0**-21.5)
    assert np.any(found != exact.astype(np.float32))
    assert each_lane("ex2.approx.ftz.f32 %d, %a;", 32, (32, [bits32(-130.0), bits32(0.0), bits32(-np.inf)])) == [
        0,
        bits32(1),
        0,
    ]


def test_roundings_of_conversions():
    a = floats(320, 7)
    single = (32, [bits32(x) for x in a])
    for ours, x in zip(each_lane("cvt.rzi.s32.f32 %d, %a;", 32, single), a, strict=True):
        assert signed(ours, 32) == (0 if x != x else max(-(2**31), min(2**31 - 1, int(max(-1e10, min(1e10, x))))))
    for ours, x in zip(each_lane("cvt.rni.s32.f32 %d, %a;", 32, single), a, strict=True):
        assert signed(ours, 32) == (0 if x != x else max(-(2**31), min(2**31 - 1, round(max(-1e10, min(1e10, x))))))
    for name, mantissa, exponent in (("bf16", 7, 8), ("f16", 10, 5)):
        finite = [x for x in a if np.isfinite(x) and x]
        finite += [float(np.uint32(0x3F808000 + (k << 16)).view(np.float32)) for k in range(4)]  # ties of bfloat16
        found = each_lane(f"cvt.rn.{name}.f32 %d, %a;", 16, (32, [bits32(x) for x in finite]))
        assert found == [to_bits(Fraction(x), mantissa, exponent) for x in finite]
        assert each_lane(f"cvt.f32.{name} %d, %a;", 32, (16, found)) == [
            bits32(from_bits(x, mantissa, exponent)) for x in found
        ]
        assert each_lane(f"cvt.rn.{name}.f32 %d, %a;", 16, (32, [INF, NAN])) == [
            bits32(np.inf) >> 16 if name == "bf16" else 0x7C00,
            0x7FFF,
        ]
        both = each_lane(
            f"cvt.rn.{name}x2.f32 %d, %a, %b;",
            32,
            *((32, [bits32(x) for x in part]) for part in (finite, finite[::-1])),
        )
        assert both == [high << 16 | low for high, low in zip(found, found[::-1], strict=True)]
    away = [0x3F800FFF, 0x3F801000, 0x3F801001, 0xBF803000, 0x7F7FFFFF, INF]
    wanted = [0x3F800000, 0x3F802000, 0x3F802000, 0xBF804000, INF, INF]
    assert each_lane("cvt.rna.tf32.f32 %d, %a;", 32, (32, away)) == wanted
    whole = values(32, 64, 8)
    same_floats(each_lane("cvt.rn.f32.u32 %d, %a;", 32, (32, whole)), np.float32(np.float64(whole)))
    same_floats(
        each_lane("cvt.rn.f32.s32 %d, %a;", 32, (32, whole)), np.float32([np.float64(signed(x, 32)) for x in whole])
    )


# Control --------------------------------------------------------------------------------------------------------------


def test_lanes_part_and_meet_again():
    """Each lane loops as often as its number says; behind the loop all of them exchange numbers."""
    found = np.zeros(32, dtype=np.uint32)
    run(
        kernel("""
            mov.b32 %r1, 0; mov.b32 %r2, 0;
        again:
            setp.ge.u32 %p1, %r1, %r0;
            @%p1 bra out;
            add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1;
            and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0;
            @%p2 bra again;
            add.s32 %r2, %r2, 100;
            bra.uni again;
        out:
            shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
            mad.wide.u32 %rd3, %r0, 4, %rd0; st.global.b32 [%rd3], %r4;"""),
        found,
    )
    wanted = [sum(range(n)) + 100 * (n // 2 + n % 2) for n in range(32)]
    assert found.tolist() == [wanted[n ^ 1] for n in range(32)]


def test_functions_are_called():
    functions = """
        .func (.param .b32 result) larger(.param .b32 a, .param .b64 b)
        {
            .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<3>;
            ld.param.b32 %r1, [a]; ld.param.b64 %rd1, [b]; cvt.u32.u64 %r2, %rd1;
            st.param.b32 [result], %r1;
            setp.gt.u32 %p1, %r1, %r2; @%p1 ret;
            st.param.b32 [result], %r2;
            ret;
        }"""
    body = """
        { .param .b32 param0; .param .b64 param1; .param .b32 retval0;
        st.param.b32 [param0], %r0; st.param.b64 [param1], 20;
        call.uni (retval0), larger, (param0, param1);
        ld.param.b32 %r3, [retval0]; }
        mad.wide.u32 %rd3, %r0, 4, %rd0; st.global.b32 [%rd3], %r3;"""
    found = np.zeros(32, dtype=np.uint32)
    run(kernel(body, functions=functions), found)
    assert found.tolist() == [max(n, 20) for n in range(32)]


def test_parameters_are_read_where_their_address_says():
    body = """
        mov.b32 %r1, second; mov.b32 %r2, first; and.b32 %r3, %r0, 1; setp.eq.u32 %p1, %r3, 0;
        selp.b32 %r4, %r1, %r2, %p1; {more}
        ld.param.b64 %rd3, [%r4]; mad.wide.u32 %rd4, %r0, 4, %rd3; st.global.b32 [%rd4], %r0;"""
    first, second = np.zeros(32, dtype=np.uint32), np.zeros(32, dtype=np.uint32)
    run(kernel(body.format(more="")), first, second)
    assert first.tolist() == [n * (n % 2) for n in range(32)]
    assert second.tolist() == [n * (1 - n % 2) for n in range(32)]
    for wrong in ("add.s32 %r4, %r4, 4;", "add.s32 %r4, %r4, 64;"):
        with pytest.raises(PtxError, match="no parameter lies there"):
            run(kernel(body.format(more=wrong)), first, second)


def test_special_registers_and_vectors():
    found = np.zeros((3, 64, 4), dtype=np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %laneid;
        mad.lo.s32 %r5, %r1, %r3, %r0; mad.wide.u32 %rd3, %r5, 16, %rd0;
        st.global.v4.b32 [%rd3], {%r0, %r1, %r2, %r4};
        ld.global.v2.u32 {%r6, %r7}, [%rd3+8]; add.s32 %r8, %r6, %r7; st.global.b32 [%rd3+4], %r8;"""
    run(kernel(body), found, warps=2, blocks=3)
    for block in range(3):
        for thread in range(64):
            assert found[block, thread].tolist() == [thread, 3 + thread % 32, 3, thread % 32]


# Whole warps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "source"),
    [
        ("shfl.sync.bfly.b32 %d, %a, 5, 31, -1;", lambda n: n ^ 5),
        ("shfl.sync.idx.b32 %d, %a, 3, 31, -1;", lambda n: 3),
        ("shfl.sync.idx.b32 %d, %a, 3, 6175, -1;", lambda n: n // 8 * 8 + 3),  # segments of 8 lanes: 0x181f
        ("shfl.sync.up.b32 %d, %a, 3, 0, -1;", lambda n: n - 3 if n >= 3 else n),
        ("shfl.sync.down.b32 %d, %a, 30, 31, -1;", lambda n: n + 30 if n < 2 else n),
    ],
)
def test_shuffles(instruction, source):
    a = values(32, 32, 9)
    assert each_lane(instruction, 32, (32, a)) == [a[source(n)] for n in range(32)]


def test_reductions_over_a_warp():
    a = values(32, 32, 10)
    assert each_lane("redux.sync.add.s32 %d, %a, -1;", 32, (32, a)) == [sum(a) % 2**32] * 32
    assert each_lane("redux.sync.max.s32 %d, %a, -1;", 32, (32, a)) == [max(signed(x, 32) for x in a) % 2**32] * 32
    assert each_lane("redux.sync.min.u32 %d, %a, -1;", 32, (32, a)) == [min(a)] * 32


def test_products_of_bfloat16():
    """A (16 x 16) and B (16 x 8) come row by row through shared memory and `ldmatrix`, B transposed on the way."""
    rng = np.random.default_rng(11)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    stored = np.concatenate([(part.view(np.uint32) >> 16).astype(np.uint16).ravel() for part in (a, b)])
    a, b = ((part.view(np.uint32) & 0xFFFF0000).view(np.float32) for part in (a, b))
    found = c.copy()
    tested = kernel(
        """
        mov.b32 %r1, room;
        mad.lo.s32 %r2, %r0, 24, %r1; mad.wide.u32 %rd3, %r0, 24, %rd1;
        ld.global.b64 %rd4, [%rd3]; ld.global.b64 %rd5, [%rd3+8]; ld.global.b64 %rd6, [%rd3+16];
        st.shared.b64 [%r2], %rd4; st.shared.b64 [%r2+8], %rd5; st.shared.b64 [%r2+16], %rd6;
        bar.sync 0;
        and.b32 %r3, %r0, 15; shr.u32 %r4, %r0, 4;
        shl.b32 %r5, %r3, 5; shl.b32 %r6, %r4, 4; add.s32 %r7, %r5, %r6; add.s32 %r7, %r7, %r1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r7];
        shl.b32 %r8, %r3, 4; add.s32 %r8, %r8, %r1;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r8+512];
        shr.u32 %r20, %r0, 2; and.b32 %r21, %r0, 3; shl.b32 %r22, %r20, 5; shl.b32 %r23, %r21, 3;
        add.s32 %r24, %r22, %r23;
        cvt.u64.u32 %rd7, %r24; add.s64 %rd8, %rd0, %rd7;
        ld.global.v2.b32 {%r30, %r31}, [%rd8]; ld.global.v2.b32 {%r32, %r33}, [%rd8+256];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r30, %r31, %r32, %r33};
        st.global.v2.b32 [%rd8], {%r30, %r31}; st.global.v2.b32 [%rd8+256], {%r32, %r33};""",
        shared=768,
    )
    run(tested, found, stored)
    np.testing.assert_allclose(found, c + a.astype(np.float64) @ b, rtol=0, atol=1e-5)
    assert not np.allclose(found, c)


def test_products_of_tf32_leave_out_the_last_bits():
    rng = np.random.default_rng(12)
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    found = np.zeros((16, 8), dtype=np.float32)
    # Lane 4 g + t has A at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) and B at (t, g), (t + 4, g).
    tested = kernel("""
        shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3;
        mad.lo.s32 %r3, %r1, 8, %r2; mad.wide.u32 %rd3, %r3, 4, %rd1;
        ld.global.b32 %r10, [%rd3]; ld.global.b32 %r11, [%rd3+256];
        ld.global.b32 %r12, [%rd3+16]; ld.global.b32 %r13, [%rd3+272];
        mad.lo.s32 %r4, %r2, 8, %r1; mad.wide.u32 %rd4, %r4, 4, %rd2;
        ld.global.b32 %r14, [%rd4]; ld.global.b32 %r15, [%rd4+128];
        mov.b32 %r16, 0f00000000;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r16, %r16, %r16, %r16};
        mad.lo.s32 %r5, %r1, 8, %r2; add.s32 %r5, %r5, %r2; mad.wide.u32 %rd5, %r5, 4, %rd0;
        st.global.v2.b32 [%rd5], {%r30, %r31}; st.global.v2.b32 [%rd5+256], {%r32, %r33};""")
    run(tested, found, a, b)
    kept = [(part.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for part in (a, b)]
    np.testing.assert_allclose(found, kept[0] @ kept[1], rtol=0, atol=1e-5)


def test_warps_need_all_their_lanes():
    for instruction in (
        "bar.sync 0;",
        "shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;",
        "redux.sync.add.s32 %r2, %r0, -1;",
        "bar.warp.sync -1;",
    ):
        tested = kernel(f"setp.lt.u32 %p1, %r0, 9; @%p1 bra out; {instruction} out: add.s32 %r3, %r0, 1;")
        with pytest.raises(PtxError, match="not all lanes"):
            run(tested, np.zeros(1))


# Faults ---------------------------------------------------------------------------------------------------------------

REVERSED = """
    mov.b32 %r1, room; mad.lo.s32 %r2, %r0, 4, %r1;
    mad.wide.u32 %rd3, %r0, 4, %rd1; ld.global.b32 %r3, [%rd3]; st.shared.b32 [%r2], %r3;
    {first}
    mov.u32 %r4, %ntid.x; sub.s32 %r5, %r4, %r0; add.s32 %r6, %r5, -1; mad.lo.s32 %r7, %r6, 4, %r1;
    ld.shared.b32 %r8, [%r7];
    {second}
    add.s32 %r9, %r8, 1; st.shared.b32 [%r2], %r9;
    {third}
    ld.shared.b32 %r10, [%r7]; mad.wide.u32 %rd4, %r0, 4, %rd0; st.global.b32 [%rd4], %r10;"""


@pytest.mark.parametrize(("warps", "barrier"), [(4, "bar.sync 0;"), (1, "bar.warp.sync -1;")])
def test_a_missing_barrier_is_found(warps, barrier):
    """Whatever the order of warps is: 20 of them. Within a warp, too."""
    before = np.arange(32 * warps, dtype=np.uint32)
    whole = dict.fromkeys(("first", "second", "third"), barrier)
    for seed in range(20):
        found = np.zeros_like(before)
        run(kernel(REVERSED.format(**whole), shared=512), found, before, warps=warps, seed=seed)
        assert found.tolist() == (before + 1).tolist()
        for missing in whole:
            tested = kernel(REVERSED.format(**whole | {missing: ""}), shared=512)
            with pytest.raises(PtxError, match=r"without a barrier|nobody wrote"):
                run(tested, found, before, warps=warps, seed=seed)


COPIED = """
    mov.b32 %r1, room; mad.lo.s32 %r2, %r0, 16, %r1; mad.wide.u32 %rd3, %r0, 16, %rd1;
    cp.async.cg.shared.global [%r2], [%rd3], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r2+512], [%rd3+512], 4, %r20; cp.async.commit_group;
    {before}
    ld.shared.b32 %r3, [%r2+4];
    {after}
    ld.shared.b32 %r4, [%r2+512]; add.s32 %r5, %r3, %r4;
    mad.wide.u32 %rd4, %r0, 4, %rd0; st.global.b32 [%rd4], %r5;"""


def test_a_copy_is_there_after_the_wait_and_not_before():
    source, found = np.arange(256, dtype=np.uint32), np.zeros(32, dtype=np.uint32)
    for count in (4, 2, 0):  # bytes that are read; the others become zero
        body = f"mov.b32 %r20, {count};" + COPIED.format(
            before="cp.async.wait_group 1;", after="cp.async.wait_group 0;"
        )
        run(kernel(body, shared=1024), found, source)
        second = source[128::4] & (2 ** (8 * count) - 1)
        assert found.tolist() == (source[1:128:4] + second).tolist()
    for before, after in (("", "cp.async.wait_all;"), ("cp.async.wait_group 2;", ""), ("cp.async.wait_group 1;", "")):
        body = "mov.b32 %r20, 4;" + COPIED.format(before=before, after=after)
        with pytest.raises(PtxError, match="without a wait"):
            run(kernel(body, shared=1024), found, source)


def test_copies_need_their_places_for_themselves():
    start = "mov.b32 %r1, room; mad.lo.s32 %r2, %r0, 16, %r1; mad.wide.u32 %rd3, %r0, 16, %rd1;"
    copied = "cp.async.cg.shared.global [%r2], [%rd3], 16; cp.async.commit_group;"
    for body, said in (
        (start + copied + "st.shared.b32 [%r2+8], %r0;", "asynchronous copy is on its way"),
        (start + copied + copied, "another asynchronous copy"),
        (
            start + copied + "bar.sync 0; st.global.b32 [%rd3], %r0; bar.sync 0; cp.async.wait_all;",
            "was written meanwhile",
        ),
        (
            start + copied + "cp.async.wait_all; xor.b32 %r5, %r2, 512; ld.shared.b32 %r6, [%r5];",
            "without a barrier|nobody wrote",
        ),
    ):
        with pytest.raises(PtxError, match=said):
            run(kernel(body, shared=1024), np.zeros(1), np.zeros(256, dtype=np.uint32), warps=2)


def test_accesses_are_checked():
    shared = "mov.b32 %r1, room; "
    for body, said in (
        ("ld.global.b32 %r2, [%rd0+64];", "outside of the tensors.*thread 0 of block.*at `ld.global.b32"),
        ("ld.global.b32 %r2, [%rd0+-4];", "outside of the tensors"),
        ("st.global.v4.b32 [%rd0+56], {%r0, %r0, %r0, %r0};", "no multiple of 16"),
        ("mad.wide.u32 %rd3, %r0, 4, %rd0; st.global.b32 [%rd3], %r0;", "outside of the tensors.*thread 16 of"),
        ("ld.global.b32 %r2, [%rd0+2];", "no multiple of 4"),
        ("ld.global.b64 %rd3, [%rd9];", "no multiple|outside"),  # a register that nothing was written to
        (shared + "st.shared.b32 [%r1+128], %r0;", "outside of shared memory"),
        (shared + "ld.shared.b32 %r2, [%r1];", "nobody wrote"),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], %r0;", "outside of shared memory"),
        ("st.global.b32 [%rd0], %r0;", "overwrites what thread 1 wrote"),
        (
            "mov.u32 %r1, %ctaid.x; add.s32 %r1, %r1, 1; setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd0], %r1;",
            "another block's thread 0",
        ),
        ("again: bra again;", "doesn't end"),
    ):
        with pytest.raises(PtxError, match=said):
            run(kernel(body, shared=128), np.zeros(16, dtype=np.uint32), blocks=2)


def test_what_several_threads_read_is_not_overwritten():
    """Threads of several warps, and several blocks, of which the last one may well write what it alone read last."""
    shared = """
        mov.b32 %r1, room; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r1], %r0; bar.sync 0;
        ld.shared.b32 %r2, [%r1]; {between} setp.eq.u32 %p2, %r0, 70; @%p2 st.shared.b32 [%r1], %r0;"""
    run(kernel(shared.format(between="bar.sync 0;"), shared=16), np.zeros(1), warps=3)
    with pytest.raises(PtxError, match="overwrites what another thread read"):
        run(kernel(shared.format(between=""), shared=16), np.zeros(1), warps=3)
    apart = """
        mov.u32 %r1, %ctaid.x; ld.global.b32 %r2, [%rd0]; bar.sync 0;
        setp.eq.u32 %p1, %r0, 9; setp.eq.and.u32 %p1, %r1, {writer}, %p1; @%p1 st.global.b32 [%rd0], %r0;"""
    for writer in range(4):
        with pytest.raises(PtxError, match=r"another (thread|block's thread)"):
            run(kernel(apart.format(writer=writer)), np.zeros(1, dtype=np.uint32), blocks=4)


def test_shared_memory_is_aligned_as_declared():
    found = np.zeros(32, dtype=np.uint32)
    tested = kernel("""
        .shared .align 2 .b8 odd[6]; .shared .align 16 .b8 even[16]; .shared .align 4 .b8 last[4];
        setp.eq.u32 %p1, %r0, 0; mov.b32 %r1, even; mov.b32 %r2, odd; mov.b32 %r3, last; cvt.u16.u32 %h1, %r0;
        @%p1 st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0}; @%p1 st.shared.b16 [%r2+4], %h1; @%p1 st.shared.b32 [%r3], 7;
        bar.sync 0; ld.shared.b32 %r4, [%r1+12]; ld.shared.b32 %r5, [%r3]; add.s32 %r6, %r4, %r5;
        mad.wide.u32 %rd3, %r0, 4, %rd0; st.global.b32 [%rd3], %r6;""")
    run(tested, found)
    assert found.tolist() == [7] * 32


def test_warps_that_end_are_missed_at_a_barrier():
    tested = kernel("setp.ge.u32 %p1, %r0, 32; @%p1 bra out; bar.sync 0; out: add.s32 %r3, %r0, 1;")
    with pytest.raises(PtxError, match="warps that have ended"):
        run(tested, np.zeros(1), warps=2)


def test_what_is_not_understood_is_named():
    for line, said in (
        ("frobnicate.s32 %r1, %r2;", r"unknown instruction frobnicate.s32 in `frobnicate.s32 %r1, %r2`"),
        ("add.rz.f32 %r1, %r2, %r3;", "add.rz.f32"),
        ("atom.global.add.u32 %r1, [%rd0], 1;", "atom.global.add.u32|no register"),
        ("wgmma.mma_async.sync %r1;", "wgmma.mma_async.sync"),
        ("add.s32 %r1, %unknown, 1;", "no register, symbol or number: '%unknown'"),
        ("bra nowhere;", "no label nowhere"),
        ("bar.sync 1;", "only barrier 0"),
        ("mov.u32 %r1, %clock;", "%clock"),
    ):
        with pytest.raises(PtxError, match=said):
            kernel(line)
