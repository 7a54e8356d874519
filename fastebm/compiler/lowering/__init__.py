"""Lowering: from a program to the instructions of one fused operator, `fastebm::run_program` (`fastebm.ops.program`).

An instruction is a convolution, a pool or a copy, followed by an epilogue of pointwise operations on values that are
still in registers or in the L1 cache. An instruction and its epilogue are a fusion group (`groups.py`). Every operation
that moves data or reads neighbours opens a group (`lower.py`); a pointwise operation is appended to the group whose
result it reads, if all its other inputs are available before that group runs (`epilogues.py`). A result is stored only
if another group reads it. Where the backward part needs the derivative of a costly activation, the group stores the
derivative instead of the activation's input. `layout.py` decides how results and weights lie in memory.
"""

from fastebm.compiler.lowering.groups import LoweringError
from fastebm.compiler.lowering.lower import LoweringResult, lower

__all__ = ["LoweringError", "LoweringResult", "lower"]
