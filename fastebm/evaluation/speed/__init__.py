"""How fast energies are sampled here: ours against the best that stock PyTorch and other libraries do.

measurement         interleaved rounds, quantiles, ratios
peers, stock        who is compared with, each at its best; anyone's energy as they are given it
comparison          verify, find each peer's fastest variant, measure, make rows
energies            the same for one energy's gradients and chains
rows, table         result rows, their JSON, and tables of them
machine, floor      what figures hang on, and what the machine can do at most
regression          whether one revision is slower than another
bench, own_energy   the command `fastebm bench`
"""

from fastebm.evaluation.speed.baselines import Updates
from fastebm.evaluation.speed.bench import bench, parsed_shape
from fastebm.evaluation.speed.comparison import Candidate, Plan, compare
from fastebm.evaluation.speed.energies import compare_chains, compare_gradients
from fastebm.evaluation.speed.machine import machine_facts, machine_name
from fastebm.evaluation.speed.measurement import Summary, interleaved, ratios
from fastebm.evaluation.speed.regression import Verdict, verdict
from fastebm.evaluation.speed.rows import Row, Run, read_runs, record, write_runs
from fastebm.evaluation.speed.table import markdown, printed

__all__ = [
    "Candidate",
    "Plan",
    "Row",
    "Run",
    "Summary",
    "Updates",
    "Verdict",
    "bench",
    "compare",
    "compare_chains",
    "compare_gradients",
    "interleaved",
    "machine_facts",
    "machine_name",
    "markdown",
    "parsed_shape",
    "printed",
    "ratios",
    "read_runs",
    "record",
    "verdict",
    "write_runs",
]
