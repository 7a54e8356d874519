"""Measures how fast energies run: fastebm against eager PyTorch, `torch.compile` and other libraries at their best.

measurement   interleaved rounds, quantiles, ratios
baselines     the implementations that fastebm is compared with
eager         copies of any energy as eager PyTorch runs it best
comparison    verifies gradients, finds each baseline's fastest variant, measures, makes rows
energies      the comparison for one energy's gradients and chains
rows, table   result rows, their JSON files, and tables of them
machine       facts about the machine
bench         the command `fastebm bench`
"""

from fastebm.evaluation.speed.baselines import Updates
from fastebm.evaluation.speed.bench import bench, list_candidates, parse_shape
from fastebm.evaluation.speed.comparison import Candidate, Plan, compare
from fastebm.evaluation.speed.energies import compare_chains, compare_gradients
from fastebm.evaluation.speed.machine import machine_facts, machine_name
from fastebm.evaluation.speed.measurement import Summary, interleaved, ratios
from fastebm.evaluation.speed.rows import Row, Run, read_runs, record, write_runs
from fastebm.evaluation.speed.table import markdown, printed

__all__ = [
    "Candidate",
    "Plan",
    "Row",
    "Run",
    "Summary",
    "Updates",
    "bench",
    "compare",
    "compare_chains",
    "compare_gradients",
    "interleaved",
    "list_candidates",
    "machine_facts",
    "machine_name",
    "markdown",
    "parse_shape",
    "printed",
    "ratios",
    "read_runs",
    "record",
    "write_runs",
]
