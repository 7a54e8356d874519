"""Builds the parser and the `--help` of a command from a dataclass: an option for each field, in named groups.

The dataclass declares names, types and defaults, and a docstring below each field explains it. A field whose type is a
dataclass itself adds the options of that dataclass. Types are int, float, str, bool, Path, a Literal, tuples of them,
and any of these or None. How an option is shown follows from three rules:

- the docstring of an option whose default is None may end in "; by default ...", which is shown as its default;
- fields called `run` or `samples` are positional;
- `GROUPS` names the group of an option, unless the field's metadata has a "group" of its own.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

GROUPS = {
    "image": "data split fit crop key convert convert_colours train_data reference_data ood_data all_real noise noisy "
    "mask mask_pattern tuning_images hide_source size sizes channels brightnesses domain flip data_noise",
    "model": "base_width activation spectral_norm variant fade latent width max_width energy_width energy_depth "
    "kl_weight learned_variance levels flow_steps bound",
    "chain": "num_steps step_size step_growth noise_start noise_end noise_std noisy_starts start_noise "
    "start_temperature hole_starts continued_starts restart chain_clip step_shrink start_size temperature data_weight "
    "data_term_weight data_term_hinge num_chains random_shifts restarts coarse clamp_ends",
    "training": "iterations batch_sizes batch_size learning_rates learning_rate energy_learning_rate lr_decay "
    "adam_betas flow_betas max_gradient_norm energy_l2 gap_brake gap_hinge trim gradient_penalty chain_kl "
    "ema warmup lambda_start lambda_max dual_rate dual_threshold elbo_weight nll_weight",
    "guard": "max_energy max_gap max_loss retries retry_lr_factor",
    "log": "log_every checkpoint_every keep_checkpoints pictures_every flight_updates tensorboard",
    "compute": "device dtype update_dtype engine max_batch recompute_from microbatches shard_optimizer",
    "output": "out overwrite",
}
"""The options of each group. An option that is in none of them stands in front, among the general options."""
FEW = 10
"""Commands with no more options than this show them in one group."""
NARROWEST, WIDEST = 40, 120
"""Columns between which a help is wrapped, however narrow or wide the terminal is."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
_POSITIONAL = ("run", "samples")


class ArgumentsError(ValueError):
    """Arguments that do not parse: which one, what was given and what is needed, on one line."""


@dataclass(frozen=True)
class Option:
    """One field of a command, or of a dataclass in a field of it. `default` is MISSING for a required option."""

    name: str
    type: Any
    text: str
    default: Any
    group: str
    metavar: str | None


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `ArgumentsError`, and whose help fits into any terminal."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, formatter_class=_Help, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-[.\d]|-inf|-nan")  # argparse takes -1e-3 for an option

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): ", r"\1 ", message)
        raise ArgumentsError(re.sub(r" expected (.*)argument", r" needs \1value", text))


def parse(
    command: Any,
    prog: str,
    arguments: Sequence[str],
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    types: Mapping[str, Any] | None = None,
) -> Any:
    """An instance of the dataclass `command` from the command line.

    Args:
        prog: the name of the command in the help.
        description: what the command does; by default the docstring of the dataclass.
        defaults, types: of single fields, in place of their own.

    Raises ArgumentsError for arguments that do not parse. Prints and exits with 0 for `--help`.
    """
    types = dict(types or {})
    found = list(options(command, defaults or {}, types))
    positional = [_form(option)["metavar"] for option in found if option.name in _POSITIONAL]
    parser = Parser(
        prog,
        usage=" ".join([prog.replace("%", "%%"), "[-h] [OPTIONS]", *positional]),
        description=description or inspect.getdoc(command) or "",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for option in sorted(found, key=lambda option: _rank(option.group)):
        name = option.group if len(found) > FEW else ""
        if name not in groups:
            groups[name] = parser.add_argument_group(f"{name} options") if name else parser
        flag = option.name if option.name in _POSITIONAL else _flag(option.name)
        groups[name].add_argument(flag, **_form(option))
    parsed = vars(parser.parse_args(_checked(arguments, found)))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    return _build(command, {option.name: option.default for option in found} | given, types)


def options(
    command: Any, defaults: Mapping[str, Any], types: Mapping[str, Any], group: str | None = None
) -> Iterator[Option]:
    """The options of a command, in the order of its fields."""
    texts = _texts(command)
    for field, hint in _fields(command, types):
        default = defaults.get(field.name, _default(field))
        if dataclasses.is_dataclass(hint):
            inner = {} if default is MISSING else vars(default)
            yield from options(hint, inner, {}, None if field.name == "config" else field.name)
        else:
            own = field.metadata.get("group", group)
            place = _GROUP_OF.get(field.name, "") if own is None else own
            yield Option(field.name, hint, texts.get(field.name, ""), default, place, field.metadata.get("metavar"))


def closest(wrong: str, names: Iterable[str]) -> str:
    """The question for the name that was meant, to stand behind a message; empty where none is like it."""
    found = difflib.get_close_matches(wrong, list(names), 1, 0.6)
    return f": did you mean {found[0]}?" if found else ""


def _checked(arguments: Sequence[str], found: Sequence[Option]) -> list[str]:
    """The arguments with - for each _ in the name of an option. Raises ArgumentsError for names of no option.

    argparse would complain of missing options first, and never say which one was meant.
    """
    names = [option.name for option in found if option.name not in _POSITIONAL]
    names += [f"no_{option.name}" for option in found if kind_of(option.type)[0] is bool]
    known = ["--help", *map(_flag, names)]
    checked = list(arguments)
    for index, argument in enumerate(itertools.takewhile(lambda argument: argument != "--", arguments)):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            if name not in known:
                raise ArgumentsError(f"there is no option {name}{closest(name, known)}")
            checked[index] = f"{name}{equals}{value}"
    return checked


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(hint: Any) -> tuple[Any, int | str | None]:
    """The type of a single value, and how many of them an option takes, as argparse's nargs says it."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (alternative for alternative in get_args(hint) if alternative is not type(None))
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        return first, "+" if others == [...] else 1 + len(others)
    return hint, None


def _form(option: Option) -> dict[str, Any]:
    """What argparse needs to know of an option."""
    text, by_default, words = option.text.partition("; by default ")
    kind, nargs = kind_of(option.type)
    required = option.default is MISSING
    shown = words if by_default else _in_words(option.default)
    form: dict[str, Any] = {"help": f"{text} ({'required' if required else f'default: {shown}'})".replace("%", "%%")}
    if kind is bool:
        return form | {"action": argparse.BooleanOptionalAction}
    form["type"] = _reader(kind)
    if option.name in _POSITIONAL:
        name = option.name.upper()
        return form | (
            {"metavar": name} if required else {"metavar": f"[{name}]", "nargs": "?", "default": option.default}
        )
    if option.metavar is not None:
        metavar: Any = option.metavar
    elif get_origin(kind) is Literal:
        metavar = f"{{{','.join(map(str, get_args(kind)))}}}"
    else:
        metavar = option.name.upper() if kind is str else kind.__name__.upper()
    if isinstance(nargs, int):
        metavar = (metavar,) * nargs
    return form | {"metavar": metavar, "nargs": nargs, "required": required, "dest": option.name}


def _in_words(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in (None, "") else str(default)


def _reader(kind: Any) -> Callable[[str], Any]:
    """Reads a single value; its complaints stand behind the name of the option."""

    def read(text: str) -> Any:
        if get_origin(kind) is Literal:
            by_text = {str(choice): choice for choice in get_args(kind)}
            if text not in by_text:
                raise argparse.ArgumentTypeError(f"must be one of {', '.join(by_text)}, got {text!r}")
            return by_text[text]
        if kind is Path and not text:
            raise argparse.ArgumentTypeError("needs a path, got an empty text")
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (kind is float and not math.isfinite(value)):
            needed = "an integer" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"needs {needed}, got {text!r}")
        return value

    return read


class _Help(argparse.HelpFormatter):
    """Wraps paragraphs one by one, and breaks no word at its hyphens."""

    def __init__(self, prog: str, **settings: Any) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=32, width=min(max(columns, NARROWEST), WIDEST), **settings)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (
            textwrap.fill(" ".join(part.split()), width, break_on_hyphens=False) for part in text.split("\n\n")
        )
        return textwrap.indent("\n\n".join(paragraphs), indent)


def _build(command: Any, values: Mapping[str, Any], types: Mapping[str, Any]) -> Any:
    arguments = {
        field.name: _build(hint, values, {}) if dataclasses.is_dataclass(hint) else values[field.name]
        for field, hint in _fields(command, types)
    }
    return command(**arguments)


def _fields(command: Any, types: Mapping[str, Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(command) | dict(types)
    return [(field, hints[field.name]) for field in dataclasses.fields(command) if field.init]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _rank(group: str) -> int:
    """The place of a group: general options and those of a single command first, then as in GROUPS."""
    return list(GROUPS).index(group) if group in GROUPS else -1


def _texts(command: Any) -> dict[str, str]:
    """The docstring below each field, on one line; that of a base class where a class has none itself.

    They are read from the source file. Where only bytecode is installed, options have no texts.
    """
    texts: dict[str, str] = {}
    for cls in (cls for cls in reversed(command.__mro__) if dataclasses.is_dataclass(cls)):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body  # type: ignore[arg-type]
        except OSError:
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                texts[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return texts
