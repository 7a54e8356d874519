"""PTX text, as LLVM writes it, decoded for the machine: registers and constants get numbers, labels places."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum

# Of the machine; see machine.h.
SHARED_BASE = 1024
# Where the kernel's parameters lie in their own memory: each has so many bytes there.
PARAMETER_BYTES = 8
UNGUARDED = -(2**31)


class PtxError(Exception):
    """PTX that isn't understood, or that did what it must not."""


class Kind(IntEnum):
    """What an instruction does to the place where a warp is."""

    PLAIN = 0
    BRANCH = 1
    CALL = 2
    RETURN = 3
    EXIT = 4
    BARRIER = 5


@dataclass
class Decoded:
    """One instruction. Operands >= 0 are registers, others constants: -1 is constant 0."""

    text: str
    kind: Kind
    name: str = ""
    operands: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    guard: int = UNGUARDED
    negated: bool = False


@dataclass
class Function:
    """Where a function begins, its registers (parameters first, then results) and how many of them are parameters."""

    first: int
    registers: int
    parameters: int


@dataclass
class Assembly:
    """A module. Function 0 is the kernel; its parameters are the first constants, which a launch fills in.

    Attributes:
        constants: bits by number, 0 for parameters.
        parameters: types of the kernel's parameters, as "u64".
        shared: bytes of shared memory that the text itself asks for; what a launch asks for lies behind them.
    """

    instructions: list[Decoded]
    functions: list[Function]
    constants: list[int]
    parameters: list[str]
    shared: int


# Text ---------------------------------------------------------------------------------------------------------------

_FUNCTION = re.compile(
    r"\.(?P<kind>entry|func)\s*(?:\((?P<results>[^)]*)\))?\s*(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<rest>[^{;]*)(?P<open>[{;])"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]\s*;")
_STATEMENT = re.compile(
    r"(?:@(?P<negated>!?)(?P<guard>[%\w$]+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL
)
_MEMORY = re.compile(
    r"(?P<what>ld|st)\.(?P<space>global|shared|param)(?:\.v(?P<count>[248]))?\.(?P<type>[bufs])(?P<bits>\d+)"
)
# Where an access may linger, and in which order others see it, are no matter here: the machine has no caches.
_HINTS = re.compile(r"\.(?:L[12]::[\w:]+|nc|ca|cg|cs|lu|cv|wb|wt|volatile|relaxed|weak|gpu|cta|sys)(?=[.\s]|$)")
_SPECIAL = {
    **{
        f"%{name}.{axis}": 4 * i + k
        for i, name in enumerate(("tid", "ntid", "ctaid", "nctaid"))
        for k, axis in enumerate("xyz")
    },
    "%laneid": 16,
}


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^\s*\.(?:loc|file|pragma)\b[^\n]*$", "", text, flags=re.MULTILINE)


def _body(text: str, start: int) -> str:
    """What stands between the brace before `start` and the one that closes it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise PtxError("a function has no end")


def _split(operands: str) -> list[str]:
    """Operands, each in one piece: "%r1", "[%rd1+4]", "{%r1, %r2}", "(a, b)"."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", operands) if part.strip()]


def _name_and_type(parameter: str) -> tuple[str, str]:
    words = parameter.split()
    kind = next(word[1:] for word in words if re.fullmatch(r"\.[busf]\d+", word))
    return words[-1], kind


# Decoding -----------------------------------------------------------------------------------------------------------


def assemble(text: str) -> Assembly:
    """A module with one kernel.

    Raises:
        PtxError: naming the first instruction that isn't understood.
    """
    text = _without_comments(text)
    found = [match for match in _FUNCTION.finditer(text) if match["open"] == "{"]
    found.sort(key=lambda match: match["kind"] != "entry")
    if not found or [match["kind"] for match in found].count("entry") != 1:
        raise PtxError("this PTX has no kernel, or several")
    module = _Module(text, {match["name"]: number for number, match in enumerate(found)})
    return module.assembled(found)


class _Module:
    """What the functions of a module share."""

    def __init__(self, text: str, functions: dict[str, int]) -> None:
        self.text, self.functions = text, functions
        self.constants: list[int] = []
        self.known: dict[int, int] = {}
        self.parameters: dict[str, int] = {}
        self.symbols: dict[str, int] = {}
        self.shared = 0
        self.instructions: list[Decoded] = []
        self.signatures: list[tuple[list[str], list[str]]] = []

    def assembled(self, found: list[re.Match[str]]) -> Assembly:
        for align, name, size in sorted(_SHARED.findall(self.text), key=lambda symbol: symbol[2] == ""):
            self.shared = -(-self.shared // int(align)) * int(align)
            self.symbols[name] = SHARED_BASE + self.shared
            self.shared += int(size or 0)
        kinds = []
        for parameter in filter(str.strip, found[0]["parameters"].split(",")):
            name, kind = _name_and_type(parameter)
            self.parameters[name] = -1 - len(self.constants)
            self.constants.append(0)
            kinds.append(kind)
        for match in found:
            both = (match[part] or "" for part in ("parameters", "results"))
            self.signatures.append(
                tuple([_name_and_type(p)[0] for p in part.split(",") if p.strip()] for part in both)  # type: ignore[arg-type]
            )
        functions = []
        for number, match in enumerate(found):
            function = _Function(self, number, _body(self.text, match.end()))
            functions.append(function.assembled())
        return Assembly(self.instructions, functions, self.constants, kinds, self.shared)

    def constant(self, bits: int) -> int:
        bits &= 2**64 - 1
        if bits not in self.known:
            self.known[bits] = -1 - len(self.constants)
            self.constants.append(bits)
        return self.known[bits]


class _Function:
    """One function under way."""

    def __init__(self, module: _Module, number: int, body: str) -> None:
        self.module, self.number, self.body = module, number, body
        parameters, results = module.signatures[number] if number else ([], [])
        self.registers: dict[str, int] = {name: i for i, name in enumerate([*parameters, *results])}
        self.parameters = len(parameters)
        self.labels: dict[str, int] = {}
        self.pending: list[tuple[Decoded, str]] = []

    def assembled(self) -> Function:
        first = len(self.module.instructions)
        for statement in self.body.replace("\n", " ").split(";"):
            self.statement(statement.strip())
        # All lanes of a function leave it together, at its end.
        self.labels[""] = len(self.module.instructions)
        self.module.instructions.append(Decoded("ret", Kind.RETURN if self.number else Kind.EXIT))
        for instruction, label in self.pending:
            if label not in self.labels:
                raise PtxError(f"no label {label} for `{instruction.text}`")
            instruction.numbers = [self.labels[label]]
        return Function(first, len(self.registers), self.parameters)

    def statement(self, text: str) -> None:
        while match := re.match(r"\s*(?:([\w$]+):(?!:)|([{}]))\s*", text):
            if match[1]:
                self.labels[match[1]] = len(self.module.instructions)
            text = text[match.end() :]
        if not text:
            return
        if text.startswith("."):
            return self.declaration(text)
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise PtxError(f"not understood: `{text}`")
        name = _HINTS.sub("", match["name"])
        operands = _split(match["operands"])
        text = re.sub(r"\s+", " ", text)
        for instruction in self.decoded(text, name, operands):
            if match["guard"]:
                instruction.guard, instruction.negated = self.operand(match["guard"]), bool(match["negated"])
            self.module.instructions.append(instruction)

    def declaration(self, text: str) -> None:
        """Registers, and parameters of a call, which are registers here."""
        words = text.split(None, 2)
        if words[0] == ".param" and len(words) == 3 and "[" not in words[2]:
            self.registers.setdefault(words[2], len(self.registers))
        elif words[0] == ".reg":
            for name in map(str.strip, words[2].split(",")):
                many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                    self.registers.setdefault(register, len(self.registers))
        elif words[0] != ".shared":
            raise PtxError(f"not understood: `{text}`")

    def operand(self, text: str) -> int:
        """A register, or a constant: an integer, the bits of a number, or the address of a symbol."""
        module = self.module
        if text in self.registers:
            return self.registers[text]
        if text in module.symbols:
            return module.constant(module.symbols[text])
        if text in module.parameters and not self.number:
            return module.constant((-1 - module.parameters[text]) * PARAMETER_BYTES)
        if match := re.fullmatch(r"0f([0-9A-Fa-f]{8})|0d([0-9A-Fa-f]{16})", text):
            return module.constant(int(match[1] or match[2], 16))
        if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return module.constant(int(match[1] + match[2], 0 if "x" in text.lower() else 10))
        raise PtxError(f"no register, symbol or number: {text!r}")

    def address(self, text: str) -> tuple[int, int]:
        """(operand, offset) of "[%rd1 + 4]"."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise PtxError(f"no address: {text!r}")
        return self.operand(match[1]), int(match[2] or "0", 0)

    def several(self, text: str) -> list[str]:
        return _split(text.strip("{}() ")) if text[0] in "{(" else [text]

    def plain(self, text: str, name: str, operands: list[int], *numbers: int) -> Decoded:
        return Decoded(text, Kind.PLAIN, name, operands, list(numbers))

    def decoded(self, text: str, name: str, given: list[str]) -> list[Decoded]:
        """The instructions of the machine that make up one of PTX."""
        if name in ("bra", "bra.uni", "ret"):
            instruction = Decoded(text, Kind.BRANCH)
            self.pending.append((instruction, given[0] if given else ""))
            return [instruction]
        if name in ("exit", "bar.sync", "barrier.sync", "barrier.sync.aligned"):
            if name != "exit" and given != ["0"]:
                raise PtxError(f"only barrier 0 of all threads is understood: `{text}`")
            return [Decoded(text, Kind.EXIT if name == "exit" else Kind.BARRIER)]
        if name in ("call", "call.uni"):
            return [self.call(text, given)]
        if match := _MEMORY.fullmatch(name):
            return [self.access(text, match, given)]
        if name.startswith("mov.") and given[1] in _SPECIAL:
            return [self.plain(text, "special", [self.operand(given[0])], _SPECIAL[given[1]])]
        if name.startswith("mov.b") and "{" in given[0] + given[1]:
            return [self.parts(text, int(name[5:]), *given)]
        if name.startswith("cvta."):  # addresses of all spaces are alike here
            return [self.plain(text, "mov.b64", [self.operand(part) for part in given])]
        if name.startswith("cp.async"):
            return [self.copy(text, name, given)]
        if match := re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(?:::cta)?\.b16", name):
            parts, place = given if match[1] == "ld" else given[::-1]
            operand, offset = self.address(place)
            operands = [*(self.operand(part) for part in self.several(parts)), operand]
            return [self.plain(text, f"{match[1]}matrix", operands, int(match[2] is not None), offset)]
        if match := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.(bf16|tf32)\.\1", name):
            return [self.product(text, match[1] == "bf16", given)]
        if name == "wgmma.wait_group.sync.aligned":
            return [self.plain(text, name, [], int(given[0]))]
        if match := re.fullmatch(r"setp\.(\w+)\.(and|or|xor)\.(\w+)", name):
            target, *compared, other = (self.operand(part) for part in given)
            found = self.registers.setdefault("what setp compares", len(self.registers))
            first = self.plain(text, f"setp.{match[1]}.{match[3]}", [found, *compared])
            return [first, self.plain(text, f"{match[2]}.pred", [target, found, other])]
        name = name.replace("shf.l.wrap.u32", "shf.l.wrap.b32").replace("bar.warp.sync.aligned", "bar.warp.sync")
        return [self.plain(text, name, [self.operand(part) for o in given for part in self.several(o)])]

    def product(self, text: str, narrow: bool, given: list[str]) -> Decoded:
        """`wgmma`: whether the numbers are of 16 bits, A and B are transposed (bits 0, 1 and 2)."""
        sums, first, second, adds, *signs = given
        if signs[:2] != ["1", "1"] or (narrow and len(signs) != 4):
            raise PtxError(f"not understood: `{text}`")
        transposed = [int(number) << bit for bit, number in enumerate(signs[2:], 1)]
        operands = [self.operand(part) for o in (sums, first, second, adds) for part in self.several(o)]
        numbers = len(self.several(sums)), len(self.several(first)), narrow + sum(transposed)
        return self.plain(text, "wgmma.mma_async", operands, *numbers)

    def call(self, text: str, given: list[str]) -> Decoded:
        results = self.several(given.pop(0)) if given[0].startswith("(") else []
        callee, arguments = given[0], self.several(given[1]) if len(given) > 1 else []
        if callee not in self.module.functions:
            raise PtxError(f"calls what isn't there: `{text}`")
        number = self.module.functions[callee]
        if tuple(map(len, self.module.signatures[number])) != (len(arguments), len(results)):
            raise PtxError(f"arguments don't fit: `{text}`")
        operands = [self.operand(part) for part in [*arguments, *results]]
        return Decoded(text, Kind.CALL, "", operands, [number, len(arguments)])

    def access(self, text: str, match: re.Match[str], given: list[str]) -> Decoded:
        loads = match["what"] == "ld"
        registers, place = given[:2] if loads else given[1::-1]
        if match["space"] == "param":
            name = place.strip("[] ")
            if name in self.module.parameters and loads and not self.number:
                return self.plain(
                    text, f"mov.b{match['bits']}", [self.operand(registers), self.module.parameters[name]]
                )
            if name.startswith("%"):
                operands, known = [self.operand(registers), self.operand(name)], len(self.module.parameters)
                return self.plain(text, "load.param", operands, PARAMETER_BYTES, 0 if self.number else known)
            source, target = (name, registers) if loads else (registers, name)
            return self.plain(text, f"mov.b{match['bits']}", [self.operand(target), self.operand(source)])
        operand, offset = self.address(place)
        operands = [self.operand(part) for part in self.several(registers)]
        if len(operands) != int(match["count"] or 1):
            raise PtxError(f"registers don't fit: `{text}`")
        size = int(match["bits"]) // 8 * (-1 if match["type"] == "s" else 1)
        name = "load" if loads else "store"
        return self.plain(text, f"{name}.{match['space']}", [*operands, operand], size, offset)

    def parts(self, text: str, bits: int, target: str, source: str) -> Decoded:
        packing = source.startswith("{")
        parts = self.several(source if packing else target)
        operands = [-1 if part == "_" else self.operand(part) for part in parts]
        whole = self.operand(target if packing else source)
        operands = [whole, *operands] if packing else [*operands, whole]
        return self.plain(text, "pack" if packing else "unpack", operands, bits // len(parts), len(parts))

    def copy(self, text: str, name: str, given: list[str]) -> Decoded:
        if name == "cp.async.wait_group":
            return self.plain(text, name, [], int(given[0], 0))
        if name in ("cp.async.commit_group", "cp.async.wait_all"):
            return self.plain(text, name, [])
        # The hint of caches went with the others.
        if name not in ("cp.async.shared.global", "cp.async.shared::cta.global"):
            raise PtxError(f"not understood: `{text}`")
        (target, to), (source, start), size = self.address(given[0]), self.address(given[1]), int(given[2], 0)
        count = self.operand(given[3]) if len(given) > 3 else self.module.constant(size)
        return self.plain(text, "cp.async", [target, source, count], size, to, start)
