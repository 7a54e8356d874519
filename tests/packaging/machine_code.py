"""Which instruction set each function of a compiled library needs, read from objdump's listing of its machine code.

The operators are compiled for several instruction sets, one of which is chosen at run time. An instruction beyond the
baseline that gets outside of these functions ends the process on an older processor. Ways for it to get there: a static
initialiser of a file that is compiled for AVX-512, or a template of the standard library that is instantiated there and
that the linker keeps for all other files.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

# What a variant may hold beside its own instructions. AVX2 stands for AVX, AVX2, FMA and F16C.
MAY_HOLD = {
    "baseline": {"baseline"},
    "avx2": {"baseline", "avx2"},
    "avx512": {"baseline", "avx2", "avx512"},
    "avx512_bf16": {"baseline", "avx2", "avx512", "avx512_bf16"},
    "amx": {"baseline", "avx2", "avx512", "avx512_bf16", "amx"},
}

# A processor of 2003 reads the first bytes 62, c4 and c5 as other instructions or refuses them: EVEX (AVX-512) and VEX.
EVEX, VEX = "62", ("c4", "c5")
BEFORE = {"26", "2e", "36", "3e", "64", "65", "67"}  # segments and sizes of addresses, which may stand before either
TILES = re.compile(r"^(ldtilecfg|sttilecfg|tile|tdp|tcmm)")
PAIRS = re.compile(r"^v(dpbf16ps|cvtne2?ps2bf16)")
# No variant asks for these parts of AVX-512: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ, IFMA, CD, FP16, VP2INTERSECT.
ABSENT = re.compile(
    r"^v(perm(b|i2b|t2b)\b|pmultishift|p(compress|expand)[bw]\b|psh[lr]d|pdp(bu|bs|wu|ws)|popcnt|pshufbitqmb|pmadd52|"
    r"pconflict|plzcnt|pbroadcastm|p2intersect|\w+(ph|sh)\b(?<!cvtps2ph)(?<!cvtph2ps))"
)
# Legacy encodings that came after SSE2, but for tzcnt: an older processor runs it as bsf, which compilers count on.
LATER = re.compile(
    r"^(addsubp[ds]|h(add|sub)p[ds]|movddup|movs[hl]dup|lddqu|fisttp\w*|"  # SSE3
    r"pabs[bwd]|psign[bwd]|pshufb|ph(add|sub)s?[wd]|phsubsw|pmaddubsw|pmulhrsw|palignr|"  # SSSE3
    r"p?blend\w+|dpp[ds]|extractps|insertps|movntdqa|mpsadbw|packusdw|pcmpeqq|pextr[bdq]|pinsr[bdq]|"  # SSE4.1
    r"pm(ax|in)(sb|sd|uw|ud)|pmov[sz]x\w+|pmuldq|pmulld|ptest|round[ps][sd]|phminposuw|"
    r"pcmpgtq|pcmp[ei]str[im]|crc32\w*|popcnt\w*|lzcnt\w*|movbe\w*|"  # SSE4.2 and bits
    r"aes\w+|pclmul\w+|sha\d\w+|adcx\w*|adox\w*|rdrand\w*|rdseed\w*|rdpid\w*|clwb|serialize|tpause|umwait)$"
)
CALL = re.compile(r"^(?:call|jmp)q? .*<(.+?)(?:\+0x[0-9a-f]+)?>$")
PREFIXES = {"lock", "rep", "repz", "repnz", "notrack", "bnd", "data16", "cs", "ds", "es", "ss", "fs", "gs", "addr32"}


def wide_level(name: str, operands: str, evex: bool) -> str:
    """The instruction set of one instruction with an EVEX or VEX prefix, in the words of `level`."""
    if evex and PAIRS.match(name):
        return "avx512_bf16"
    if ABSENT.match(name):
        return f"{name}, which no variant asks for"
    if evex or name.startswith("k"):
        return "avx512"
    if TILES.match(name):
        return "amx"
    return "avx2" if "mm" in operands or name.startswith("vzero") else f"{name}, which is of BMI"


def level(code: str, text: str) -> str:
    """The instruction set of one instruction: a key of MAY_HOLD, or words for one that no variant may hold."""
    name, _, operands = text.partition(" ")
    while name in PREFIXES or name.startswith("{"):
        name, _, operands = operands.strip().partition(" ")
    while code[:2] in BEFORE:
        code = code[3:]
    if code.startswith((EVEX, *VEX)):
        return wide_level(name, operands, code.startswith(EVEX))
    return f"{name}, which is later than SSE2" if LATER.match(name) else "baseline"


def initialises(symbol: str) -> bool:
    """Whether a function runs while the library is loaded, for the static objects of a file."""
    return symbol.startswith("_GLOBAL__") or "static_initialization" in symbol


def variant(symbol: str) -> str:
    """The variant that a function belongs to, by its name; `baseline` for all that may run on any processor."""
    if initialises(symbol):
        return "baseline"
    # ISA as a namespace (fastebm::avx2::run) or as the end of a function's name (scale_avx2<float>).
    named = set(re.findall(r"(?<![a-z0-9])(avx2|avx512_bf16|avx512|amx)(?![a-z0-9_])", symbol))
    return named.pop() if len(named) == 1 else "baseline"


def instructions(listing: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Symbol, bytes and text of each instruction of `objdump --disassemble --demangle`."""
    symbol = ""
    for line in listing:
        fields = line.split("\t")
        if len(fields) > 2:
            yield symbol, fields[1], fields[2].strip()
        elif heading := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            symbol = heading.group(1)


def read(listing: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
    """How many instructions of each set there are, and, by symbol, the first one that does not belong there.

    A call of a variant does not belong into a static initialiser either.
    """
    count: dict[str, int] = {}
    faults: dict[str, str] = {}
    for symbol, code, text in instructions(listing):
        found = level(code, text)
        count[found] = count.get(found, 0) + 1
        called = CALL.match(text) if initialises(symbol) else None
        if found not in MAY_HOLD[variant(symbol)] or (called and variant(called.group(1)) != "baseline"):
            faults.setdefault(symbol, text)
    return count, faults


def disassembly(objdump: str, library: Path) -> str:
    """The listing of all code of a library, with the bytes of each instruction in one line."""
    command = [objdump, "--disassemble", "--demangle", "--wide", "--insn-width=16", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
