"""Builds the parser and the `--help` of a command from a dataclass: an option for each field, in named groups.

The dataclass declares names, types and defaults, and a docstring below each field explains it. A field whose type is a
dataclass itself adds the options of that dataclass. How an option is shown follows from three rules:

- the docstring of an option whose default is None may end in "; by default ...", which is shown as its default;
- fields called `run` or `samples` are positional;
- `GROUPS` names the group of an option, unless the field's metadata has a "group" of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

GROUPS = {
    "image": "data split fit crop key convert convert_colours train_data reference_data ood_data all_real noise noisy "
    "mask mask_pattern tuning_images hide_source size sizes channels brightnesses domain flip data_noise",
    "model": "base_width activation spectral_norm variant fade latent width max_width energy_width energy_depth "
    "kl_weight learned_variance levels flow_steps bound",
    "chain": "num_steps step_size noise_start noise_end noise_std noisy_starts start_noise start_temperature "
    "hole_starts start_size temperature data_weight data_term_weight data_term_hinge num_chains random_shifts restarts "
    "coarse clamp_ends",
    "training": "iterations batch_sizes batch_size learning_rates learning_rate energy_learning_rate lr_decay "
    "adam_betas flow_betas max_gradient_norm energy_l2 ema warmup lambda_start lambda_max dual_rate dual_threshold "
    "elbo_weight nll_weight",
    "guard": "max_energy max_gap max_loss retries retry_lr_factor",
    "log": "log_every checkpoint_every keep_checkpoints pictures_every tensorboard",
    "compute": "device dtype update_dtype engine max_batch recompute_from",
    "output": "out overwrite",
}
"""The options of each group. An option that is in none of them stands in front, among the general options."""
FEW = 10
"""Commands with no more options than this show them in one group."""

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
_POSITIONAL = ("run", "samples")
_IN_WORDS = {"None": "none", "True": "on", "False": "off", "": "none"}


@dataclass(frozen=True)
class Option:
    """One field of a command, or of a dataclass in a field of it. `default` is MISSING for a required option."""

    name: str
    type: Any
    text: str
    default: Any
    group: str
    metavar: str | None


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

    Prints and exits, as argparse does, for `--help` (with 0) and for arguments that do not parse (with 2).
    """
    types = dict(types or {})
    paragraphs = (description or inspect.getdoc(command) or "").split("\n\n")
    found = list(options(command, defaults or {}, types))
    groups: dict[str, list[Any]] = {"": []}
    for option in sorted(found, key=lambda option: _rank(option.group)):
        groups.setdefault(option.group if len(found) > FEW else "", []).append(_field(option))
    boxes = [(name, _form(name, fields)) for name, fields in groups.items() if name]
    parsed = tyro.cli(
        _form(command.__name__, [*groups[""], *boxes]),
        prog=prog,
        description="\n\n".join(" ".join(text.split()) for text in paragraphs),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    values = dict(vars(parsed))
    for name, _ in boxes:
        values |= vars(values.pop(name))
    return _build(command, values, types)


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


def _field(option: Option) -> tuple[Any, ...]:
    """The field of a dataclass that makes tyro show the option."""
    text, by_default, words = option.text.partition("; by default ")
    metavar = option.metavar
    if option.name in _POSITIONAL:
        metavar = option.name.upper() if option.default is MISSING else f"[{option.name.upper()}]"
    elif metavar is None and str in (option.type, *get_args(option.type)):
        metavar = option.name.upper()
    hint = f"(default: {words})" if by_default else lambda label: f"(default: {_IN_WORDS.get(label, label)})"
    kind: Any = Annotated[option.type, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint)]
    kind = Annotated[kind, tyro.conf.Positional] if option.name in _POSITIONAL else kind
    return option.name, kind, *(() if option.default is MISSING else (dataclasses.field(default=option.default),))


def _form(name: str, fields: Sequence[Any]) -> Any:
    return dataclasses.make_dataclass(name, fields, kw_only=True, namespace={"__doc__": " "})


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
