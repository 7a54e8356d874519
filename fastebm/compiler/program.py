"""Programs: the compiler's intermediate representation, a list of named operations in single-assignment form."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastebm.compiler.lazy_tensors import Shape
from fastebm.compiler.operations import Input, LinearCombination, Operation, WeightGradient

INPUT = "x"


@dataclass(frozen=True)
class Node:
    """One operation. `inputs` names the nodes whose results it reads; `shape` is its result's shape for one sample."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Program:
    """Nodes in an order in which they can run, the input first, and the names of the results to return."""

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

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def users(self, name: str) -> list[Node]:
        """The nodes that read the result `name`, in their order, each once."""
        return self._users[name]

    def only_user(self, name: str) -> Node | None:
        """The only node that reads the result `name`, if it reads it once and the result is no output."""
        users = self.users(name)
        alone = len(users) == 1 and users[0].inputs.count(name) == 1 and name not in self.outputs
        return users[0] if alone else None

    def input_shapes(self, node: Node) -> list[Shape]:
        """The shapes of the results that `node` reads."""
        return [self[name].shape for name in node.inputs]

    def with_nodes(self, nodes: Iterable[Node]) -> "Program":
        """A program of these nodes with the same outputs, without dead code."""
        return eliminate_dead_code(Program(tuple(nodes), self.outputs))


class Builder:
    """A growing list of nodes. It infers shapes and chooses free names."""

    def __init__(self, nodes: Iterable[Node] = (), reserved: Iterable[str] = ()):
        self.nodes = list(nodes)
        self._shapes = {node.name: node.shape for node in self.nodes}
        self._used = Counter(dict.fromkeys([*self._shapes, *reserved], 1))

    def add(self, operation: Operation, *inputs: str, name: str) -> str:
        """Append the operation and return its name: `name`, with a number appended if that is in use."""
        free = name
        while free in self._used:
            free = f"{name}_{self._used[name]}"
            self._used[name] += 1
        return self.add_exact(operation, *inputs, name=free)

    def add_exact(self, operation: Operation, *inputs: str, name: str) -> str:
        """Append the operation under exactly this name."""
        shape = operation.shape(*(self._shapes[other] for other in inputs))
        self.nodes.append(Node(name, operation, inputs, shape))
        self._shapes[name] = shape
        self._used[name] += 1
        return name

    def shape(self, name: str) -> Shape:
        return self._shapes[name]


class Rewriter:
    """Replaces one node by new operations; the last one takes over the node's name, and with it all its users.

    With `rewriter = Rewriter(program, node)`, `rewriter.add(...)` inserts an operation before the node, and
    `rewriter.finish(...)` returns the program in which another operation replaces the node.
    """

    def __init__(self, program: Program, node: Node):
        self.program = program
        self.node = node
        at = program.nodes.index(node)
        self._after = program.nodes[at + 1 :]
        self._builder = Builder(program.nodes[:at], reserved=[other.name for other in program.nodes])

    def add(self, operation: Operation, *inputs: str) -> str:
        return self._builder.add(operation, *inputs, name=self.node.name)

    def finish(self, operation: Operation, *inputs: str) -> Program:
        self._builder.add_exact(operation, *inputs, name=self.node.name)
        shape = self._builder.shape(self.node.name)
        if shape != self.node.shape:
            raise ValueError(f"a rewrite of {self.node} gives shape {shape}")
        return self.program.with_nodes([*self._builder.nodes, *self._after])


def replace_nodes(program: Program, changes: dict[str, Node]) -> Program:
    """The program with some nodes replaced by others of the same names."""
    return program.with_nodes(changes.get(node.name, node) for node in program)


def eliminate_dead_code(program: Program) -> Program:
    """The same outputs without repeated operations, sums of a single term, and nodes that nothing reads."""
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
        if node.name in needed or isinstance(node.operation, WeightGradient):
            needed.update((node.name, *node.inputs))
    return Program(tuple(node for node in kept if node.name in needed or isinstance(node.operation, Input)), outputs)
