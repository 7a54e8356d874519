"""Pointwise operations, lowered into the epilogues of fusion groups."""

from __future__ import annotations

from dataclasses import replace

from fastebm.compiler import operations as op
from fastebm.compiler.lazy_tensors import lazy
from fastebm.compiler.lowering.groups import Group, GroupBuilder, Location
from fastebm.compiler.lowering.layout import broadcast_to_image
from fastebm.compiler.program import Node
from fastebm.ops.activations import PROGRAM_ACTIVATIONS
from fastebm.ops.instructions import Epilogue, EpilogueOp


class EpilogueBuilder(GroupBuilder):
    """Appends pointwise operations to groups."""

    def lower_pointwise(self, node: Node) -> None:
        """Append to the group of the newest input, or to a new group that starts by copying the first input."""
        name = self._fusion_target(node)
        group = self.group_ending_in(name) if name is not None else None
        if name is None or group is None:
            name = node.inputs[0]
            group = self.copy_group(name, self.locate(name, plain=False), self.images[name])
            number = len(self.groups) - 1
        else:
            number = self.group_of[name]
            self.close_group(group, next_node=node)
        self._append(group, node, name)
        group.result = node.name
        self.group_of[node.name] = number

    def _fusion_target(self, node: Node) -> str | None:
        """The input to whose group the operation is appended: the newest one, if the others are stored before it."""
        candidates = node.inputs[:1] if isinstance(node.operation, op.ActivationDerivative) else node.inputs
        open_inputs = {name: self.group_of[name] for name in node.inputs if self.group_ending_in(name) is not None}
        newest = max(open_inputs.values(), default=-1)
        for name in candidates:
            others = [other for other in node.inputs if other != name]
            read_once = len(others) == len(node.inputs) - 1
            available = all(self._available_before(other, newest) for other in others)
            if open_inputs.get(name) == newest and read_once and available:
                return name
        return None

    def _available_before(self, name: str, number: int) -> bool:
        """Whether a group before `number` stores the result."""
        if self.group_ending_in(name) is not None:
            return self.group_of[name] < number
        location = self.locations.get(name)
        if location is None:
            return True  # the derivative at `name` is stored instead
        stores = (EpilogueOp.STORE, EpilogueOp.ACTIVATE_KEEPING)
        writers = [
            k
            for k, group in enumerate(self.groups)
            if any(step.buffer == location.buffer and step.op in stores for step in group.epilogue)
        ]
        return bool(writers) and max(writers) < number

    def _append(self, group: Group, node: Node, name: str) -> None:
        """Append the steps of a pointwise operation on `name`, which is the group's value."""
        operation, add = node.operation, group.epilogue.append
        if isinstance(operation, op.LinearCombination):
            terms = zip(operation.coefficients, node.inputs, strict=True)
            (first, _), *more = sorted(terms, key=lambda term: term[1] != name)
            if first != 1:
                add(self.scaling(first))
            for c, other in more:  # `name` again, if it is there twice: it is stored
                add(self.operand(EpilogueOp.ADD, other, number=self.add_number(c) if c != 1 else -1))
        elif isinstance(operation, op.Multiply):
            others = [other for other in node.inputs if other != name] or [name]
            add(self.operand(EpilogueOp.MULTIPLY, others[0]))
        elif isinstance(operation, op.Affine):
            for step, weight in (
                (EpilogueOp.MULTIPLY_CONSTANT, operation.scale),
                (EpilogueOp.ADD_CONSTANT, operation.shift),
            ):
                if weight is not None:
                    image = lazy(broadcast_to_image, weight, self.images[node.name], node.shape)
                    add(Epilogue(step, number=self.add_constant("image", image)))
        elif isinstance(operation, op.Activation):
            self._append_activation(group, operation, name)
        elif isinstance(operation, op.ActivationDerivative):
            stored = self.derivatives.get((node.inputs[1], operation.kind, operation.parameters))
            if stored is not None:
                add(Epilogue(EpilogueOp.MULTIPLY, stored.buffer))
            else:
                number = self.add_parameters(operation.parameters)
                derivative = self.operand(EpilogueOp.SLOPE, node.inputs[1], number)
                add(
                    replace(
                        derivative,
                        activation=PROGRAM_ACTIVATIONS.index(operation.kind),
                        of_result=int(operation.of_result),
                    )
                )

    def _append_activation(self, group: Group, operation: op.Activation, name: str) -> None:
        kind, number = PROGRAM_ACTIVATIONS.index(operation.kind), self.add_parameters(operation.parameters)
        if any(self.needs_derivative(user, operation, name) for user in self.program.users(name)):
            location = Location(self.add_buffer(group.image))
            self.derivatives[name, operation.kind, operation.parameters] = location
            group.epilogue.append(
                Epilogue(EpilogueOp.ACTIVATE_KEEPING, location.buffer, number=number, activation=kind)
            )
        else:
            group.epilogue.append(Epilogue(EpilogueOp.ACTIVATE, number=number, activation=kind))
