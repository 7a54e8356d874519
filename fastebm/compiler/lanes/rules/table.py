"""The table of rules: how each operation of a graph is lowered, by its name."""

from __future__ import annotations

from collections.abc import Callable

from ..lowering import Lowering
from ..values import Value

# rule(lowering, node, *arguments of the operation) -> its value, or a list of them.
Rule = Callable[..., Value]

RULES: dict[str, Rule] = {}
# The same where an argument or the result is complex.
COMPLEX_RULES: dict[str, Rule] = {}


def rule(*names: str, table: dict[str, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Enters a function into the table."""

    def enter(function: Rule) -> Rule:
        for name in names:
            assert name not in table, name
            table[name] = function
        return function

    return enter


__all__ = ["COMPLEX_RULES", "RULES", "Lowering", "Rule", "rule"]
