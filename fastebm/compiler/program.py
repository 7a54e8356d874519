"""A program: a list of operations on a batch of samples, each result with a name and used after it was made."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastebm.compiler.lazy_tensors import Shape
from fastebm.compiler.operations import Input, LinearCombination, Operation

INPUT = "x"


@dataclass(frozen=True)
class Node:
    """One operation on the results named `inputs`; `shape` is that of one sample of its own result."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Program:
    """Nodes in an order in which they can run, and the names of those that are wanted; the first node is the input."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _users(self) -> dict[str, list[Node]]:
        users: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users[name].append(node)
        return users

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def inputs(self, node: Node) -> list[Node]:
        """The nodes whose results `node` reads."""
        return [self[name] for name in node.inputs]

    def users(self, name: str) -> list[Node]:
        """The nodes that read the result `name`, each once, in their order."""
        return self._users[name]

    def only_user(self, name: str) -> Node | None:
        """The node that alone reads the result `name`, if it is read once and isn't an output."""
        users = self.users(name)
        alone = len(users) == 1 and users[0].inputs.count(name) == 1 and name not in self.outputs
        return users[0] if alone else None

    def shapes(self, node: Node) -> list[Shape]:
        """The shapes of what `node` reads."""
        return [self[name].shape for name in node.inputs]

    def with_nodes(self, nodes: Iterable[Node]) -> "Program":
        """A tidy program of these nodes in their order and the same outputs."""
        return eliminate_dead_code(Program(tuple(nodes), self.outputs))


class Builder:
    """Grows a list of nodes; shapes are worked out on the way."""

    def __init__(self, nodes: Iterable[Node] = (), taken: Iterable[str] = ()):
        self.nodes = list(nodes)
        self._shapes = {node.name: node.shape for node in self.nodes}
        self._taken = Counter(dict.fromkeys([*self._shapes, *taken], 1))

    def add(self, operation: Operation, *inputs: str, name: str) -> str:
        """Append the operation, and return its name: `name`, with a number behind if that is taken."""
        chosen = name
        while chosen in self._taken:
            chosen = f"{name}_{self._taken[name]}"
            self._taken[name] += 1
        return self.add_exact(operation, *inputs, name=chosen)

    def add_exact(self, operation: Operation, *inputs: str, name: str) -> str:
        """Append the operation under exactly that name."""
        shape = operation.shape(*(self._shapes[other] for other in inputs))
        self.nodes.append(Node(name, operation, inputs, shape))
        self._shapes[name] = shape
        self._taken[name] += 1
        return name

    def shape(self, name: str) -> Shape:
        return self._shapes[name]


class Rewriter:
    """New operations in the place of one node. The last takes over its name, so that all that read it read that.

    With `edit = Rewriter(program, node)`, `edit.add(...)` puts an operation before the node, and `edit.finish(...)` gives
    the program in which the node itself is another operation.
    """

    def __init__(self, program: Program, node: Node):
        self.program = program
        self.node = node
        at = program.nodes.index(node)
        self._after = program.nodes[at + 1 :]
        self._builder = Builder(program.nodes[:at], taken=[other.name for other in program.nodes])

    def add(self, operation: Operation, *inputs: str) -> str:
        return self._builder.add(operation, *inputs, name=self.node.name)

    def finish(self, operation: Operation, *inputs: str) -> Program:
        self._builder.add_exact(operation, *inputs, name=self.node.name)
        made = self._builder.nodes[-1]
        if made.shape != self.node.shape:
            raise ValueError(f"a rewrite of {self.node} gives shape {made.shape}")
        return self.program.with_nodes([*self._builder.nodes, *self._after])


def replace_nodes(program: Program, changes: dict[str, Node]) -> Program:
    """The program with some nodes exchanged for others of the same names."""
    return program.with_nodes(changes.get(node.name, node) for node in program)


def eliminate_dead_code(program: Program) -> Program:
    """The same results without repetitions, sums of one term, and nodes that nothing needs."""
    renamed: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    kept: list[Node] = []
    for node in program:
        inputs = tuple(renamed.get(name, name) for name in node.inputs)
        key = (node.operation, inputs)
        if isinstance(node.operation, LinearCombination) and len(inputs) == 1 and node.operation.coefficients[0] == 1:
            renamed[node.name] = inputs[0]
        elif key in seen:
            renamed[node.name] = seen[key]
        else:
            seen[key] = node.name
            kept.append(replace(node, inputs=inputs))
    outputs = tuple(renamed.get(name, name) for name in program.outputs)
    needed = set(outputs)
    for node in reversed(kept):
        if node.name in needed:
            needed.update(node.inputs)
    return Program(tuple(node for node in kept if node.name in needed or isinstance(node.operation, Input)), outputs)
