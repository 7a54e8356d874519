"""The list of all operators: name, schema, and the files that implement each.

A *public* schema is `torch.ops.fastebm.<name>`; its implementation allocates outputs, checks the arguments and chooses
a backend. A *kernel* schema is what every backend implements under one name, writing into tensors it is given:
`fastebm_cpp::<name>` (C++), `fastebm_cuda::<name>` (CUDA C++), `fastebm.ops.triton.<subject>.<name>` and the reference
`fastebm.ops.<subject>.reference_<name>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .options import StepOptions, TailOptions, schema_of

__all__ = ["KERNELS", "PUBLIC", "Kernel"]

_STEP = schema_of(StepOptions)
_MCLMC = (
    "(Tensor(a!) x, Tensor(b!) momentum, Tensor(c!) work, Tensor grad, Tensor coefficients, Tensor key, "
    "Tensor chain_ids, Tensor? inverse_mass) -> ()"
)
_TAIL = schema_of(TailOptions)

# Public operators by name.
PUBLIC: dict[str, str] = {
    "normal": "(SymInt[] shape, Tensor key, Tensor chain_ids, int stream, ScalarType dtype) -> Tensor",
    "uniform": "(SymInt[] shape, Tensor key, Tensor chain_ids, int stream, ScalarType dtype) -> Tensor",
    "langevin_step": f"(Tensor x, Tensor grad, {_STEP}) -> Tensor",
    "langevin_step_": f"(Tensor(a!) x, Tensor grad, {_STEP}) -> ()",
    "kinetic_step_": (
        "(Tensor(a!) x, Tensor(b!) velocity, Tensor(c!)? work, Tensor grad, Tensor schedule, Tensor key, "
        "Tensor chain_ids, Tensor? inverse_mass, float? low, float? high, int scheme, bool close, bool open) -> ()"
    ),
    "kinetic_energy": "(Tensor velocity, Tensor? inverse_mass) -> Tensor",
    "mala_step_": (
        "(Tensor(a!) x, Tensor(b!) energy, Tensor(c!) grad, Tensor proposal, Tensor proposal_energy, "
        "Tensor proposal_grad, Tensor schedule, Tensor key, Tensor chain_ids, float? grad_clip, float? low, "
        "float? high) -> (Tensor, Tensor)"
    ),
    "metropolis_": (
        "(Tensor(a!) x, Tensor(b!) energy, Tensor(c!) grad, Tensor proposal, Tensor proposal_energy, "
        "Tensor proposal_grad, Tensor log_ratio, Tensor key, Tensor chain_ids) -> Tensor"
    ),
    "mclmc_step_": _MCLMC,
    "block_tail": f"(Tensor main, Tensor skip, Tensor? fade, {_TAIL}) -> Tensor",
    "block_tail_backward": f"(Tensor grad, Tensor main, {_TAIL}) -> (Tensor, Tensor, Tensor)",
    "block_tail_double_backward": (
        "(Tensor grad_main, Tensor grad_skip, Tensor? grad_fade, "
        f"Tensor grad, Tensor main, {_TAIL}) -> (Tensor, Tensor)"
    ),
    "expand_blend": "(Tensor primal, Tensor fade, Tensor beta) -> Tensor",
    "expand_blend_backward": "(Tensor grad, Tensor beta) -> (Tensor, Tensor)",
    "run_program": "(Tensor x, Tensor code, Tensor[] constants, Tensor(a!) workspace) -> (Tensor, Tensor)",
    "weight_gradients_": "(Tensor(a!)[] results, Tensor factors, Tensor code, Tensor tasks, Tensor workspace) -> ()",
    "run_lanes": (
        "(Tensor x, Tensor code, Tensor tables, Tensor constants, Tensor? conditions=None) -> (Tensor, Tensor)"
    ),
    "run_lane_chain": (
        "(Tensor(a!) x, Tensor code, Tensor tables, Tensor constants, int num_steps, "
        f"{schema_of(StepOptions, key='Tensor(b!)')}, Tensor? conditions=None, int noise_order=0) -> Tensor"
    ),
    "run_lane_sampler": (
        "(Tensor(a!) x, Tensor(b!) energy, Tensor(c!) gradient, Tensor(d!)? velocity, Tensor code, Tensor tables, "
        "Tensor constants, int num_steps, int kind, int num_leapfrogs, Tensor schedule, Tensor(e!) key, "
        "Tensor chain_ids, Tensor? temperature, Tensor? inverse_mass, Tensor? mask, float? grad_clip, float? low, "
        "float? high, Tensor? conditions=None) -> (Tensor, Tensor, Tensor)"
    ),
    "run_chain": (
        "(Tensor(a!) x, Tensor code, Tensor[] constants, Tensor(b!) workspace, int num_steps, "
        f"{schema_of(StepOptions, key='Tensor(c!)')}) -> Tensor"
    ),
}


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        subject: the name of its files (`ops/<subject>.py`, `csrc/cpu/<subject>.cpp`, ...).
        schema: its arguments and results.
        backends: those that implement it, besides the reference.
    """

    subject: str
    schema: str
    backends: tuple[str, ...] = ("cpp", "triton", "cuda")


# Kernels, which backends implement, by name.
KERNELS: dict[str, Kernel] = {
    "normal": Kernel("normal", "(Tensor(a!) out, Tensor key, Tensor chain_ids, int stream) -> ()"),
    "uniform": Kernel("uniform", "(Tensor(a!) out, Tensor key, Tensor chain_ids, int stream) -> ()"),
    "langevin_step": Kernel("langevin", f"(Tensor(a!) out, Tensor x, Tensor grad, {_STEP}) -> ()"),
    "kinetic_step": Kernel(
        "underdamped",
        "(Tensor(a!) x, Tensor(b!) velocity, Tensor(c!)? work, Tensor grad, Tensor schedule, Tensor key, "
        "Tensor chain_ids, Tensor? inverse_mass, float? low, float? high, int scheme, bool close, bool open) -> ()",
        backends=("cpp", "triton"),
    ),
    # The velocity first: its dtype, not that of the sums, decides on the backend.
    "kinetic_energy": Kernel(
        "underdamped", "(Tensor velocity, Tensor(a!) out, Tensor? inverse_mass) -> ()", backends=("cpp", "triton")
    ),
    "mala_step": Kernel(
        "mala",
        "(Tensor(a!) x, Tensor(b!) energy, Tensor(c!) grad, Tensor(d!) accepted, Tensor(e!) log_ratio, "
        "Tensor proposal, Tensor proposal_energy, Tensor proposal_grad, Tensor schedule, Tensor key, "
        "Tensor chain_ids, float? grad_clip, float? low, float? high) -> ()",
        backends=("cpp", "triton"),
    ),
    "metropolis": Kernel(
        "mala",
        "(Tensor(a!) x, Tensor(b!) energy, Tensor(c!) grad, Tensor(d!) accepted, Tensor proposal, "
        "Tensor proposal_energy, Tensor proposal_grad, Tensor log_ratio, Tensor key, Tensor chain_ids) -> ()",
        backends=("cpp", "triton"),
    ),
    "mclmc_step": Kernel("mclmc", _MCLMC, backends=("cpp", "triton")),
    "block_tail": Kernel("block_tail", f"(Tensor(a!) out, Tensor main, Tensor skip, Tensor? fade, {_TAIL}) -> ()"),
    "block_tail_backward": Kernel(
        "block_tail",
        f"(Tensor(a!) grad_main, Tensor(b!) grad_skip, Tensor(c!)? grad_fade, Tensor grad, Tensor main, {_TAIL}) -> ()",
    ),
    "block_tail_double_backward": Kernel(
        "block_tail",
        "(Tensor(a!) out_grad, Tensor(b!) out_main, Tensor grad_main, Tensor grad_skip, Tensor? grad_fade, "
        f"Tensor grad, Tensor main, {_TAIL}) -> ()",
    ),
    "expand_blend": Kernel("expand_blend", "(Tensor(a!) out, Tensor primal, Tensor fade, Tensor beta) -> ()"),
    "expand_blend_backward": Kernel(
        "expand_blend", "(Tensor(a!) grad_primal, Tensor(b!) grad_fade, Tensor grad, Tensor beta) -> ()"
    ),
    "run_lanes": Kernel(
        "lanes",
        "(Tensor(a!) energies, Tensor(b!) gradient, Tensor x, Tensor code, Tensor tables, Tensor constants, "
        "Tensor conditions) -> ()",
        backends=("cpp",),
    ),
    "run_lane_chain": Kernel(
        "lanes",
        "(Tensor(a!) energies, Tensor(b!) x, Tensor code, Tensor tables, Tensor constants, Tensor conditions, "
        f"int noise_order, {schema_of(StepOptions, key='Tensor(c!)')}) -> ()",
        backends=("cpp",),
    ),
    "run_lane_sampler": Kernel(
        "lane_samplers",
        "(Tensor(a!) energies, Tensor(b!) accepted, Tensor(c!) log_ratio, Tensor(d!) x, Tensor(e!) energy, "
        "Tensor(f!) gradient, Tensor(g!)? velocity, Tensor code, Tensor tables, Tensor constants, Tensor conditions, "
        "int kind, int num_leapfrogs, Tensor schedule, Tensor(h!) key, Tensor chain_ids, Tensor? temperature, "
        "Tensor? inverse_mass, Tensor? mask, float? grad_clip, float? low, float? high) -> ()",
        backends=("cpp",),
    ),
    # On a GPU in Triton alone, whose compiler specialises each instruction.
    "run_program": Kernel(
        "program",
        "(Tensor(a!) energies, Tensor(b!) gradient, Tensor x, Tensor code, Tensor[] constants, "
        "Tensor(c!) workspace) -> ()",
        backends=("cpp", "triton"),
    ),
    # The factors first: their dtype and device decide on the backend.
    "weight_gradients": Kernel(
        "weight_gradients",
        "(Tensor factors, Tensor(a!)[] results, Tensor code, Tensor tasks, Tensor workspace) -> ()",
        backends=("cpp", "triton"),
    ),
    "run_chain": Kernel(
        "chain",
        "(Tensor(a!) energies, Tensor(b!) x, Tensor(c!) gradient, Tensor code, Tensor[] constants, "
        f"Tensor(d!) workspace, {schema_of(StepOptions, key='Tensor(e!)')}) -> ()",
        backends=("cpp", "triton"),
    ),
}

# Kept for the life of the process: a Library that is collected takes its operators with it.
LIBRARY = torch.library.Library("fastebm", "DEF")
_COMPILED = {name: torch.library.Library(f"fastebm_{name}", "DEF") for name in ("cpp", "cuda")}

for _name, _schema in PUBLIC.items():
    LIBRARY.define(_name + _schema)
for _backend, _library in _COMPILED.items():
    for _name, _kernel in KERNELS.items():
        if _backend in _kernel.backends:
            _library.define(_name + _kernel.schema)
