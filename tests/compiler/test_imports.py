"""What `import fastebm` and its first names load: no module that takes long beside `import torch`."""

import subprocess
import sys

import pytest

from fastebm.ops import backends

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


FIRST_USE = """
import sys
import torch, fastebm
fastebm.energy_gradient(lambda x: x.square().sum((1, 2, 3)))(torch.ones(2, 1, 4, 4))
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""


@pytest.mark.skipif(
    not backends.runs_compiled("run_lanes"), reason="the compiled operators are not built, or not chosen"
)
def test_the_first_use_of_an_image_energy_without_products_loads_no_exporter():
    found = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_samplers_and_gradients_load_nothing_heavy():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
