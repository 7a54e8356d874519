"""What `import fastebm` and its first names load: no module that takes long beside `import torch`."""

import subprocess
import sys

HEAVY = (
    "matplotlib",
    "PIL",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
)

PROGRAM = f"""
import sys
import torch
before = set(sys.modules)
import fastebm
fastebm.Langevin, fastebm.Cascade, fastebm.energy_gradient
from fastebm.compiler import energy_gradient
print([name for name in {HEAVY} if name in sys.modules and name not in before])
"""


def test_samplers_and_gradients_load_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
