"""The constructor of every net takes its arguments in their types, and refuses others in one line."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastebm import models
from fastebm.models import VAE, CoarseToFineEnergy, Flow, MultiScaleEnergy

NETS: dict[type[nn.Module], dict[str, Any]] = {
    CoarseToFineEnergy: {"image_size": 8, "channels": 1, "base_width": 1},
    MultiScaleEnergy: {"size": 8, "channels": 1, "width": 2, "depth": 1},
    VAE: {"size": 8, "channels": 1, "latent": 2, "width": 2},
    Flow: {"shape": (1, 8, 8), "levels": 1, "flow_steps": 1, "width": 2},
}
WRONG: list[Any] = [None, "8", "a text", -1, 2.5, math.nan, math.inf, [], {}, object(), torch.ones(2)]


def test_every_net_is_here() -> None:
    public = [getattr(models, name) for name in models.__all__]
    assert set(NETS) == {kind for kind in public if isinstance(kind, type) and issubclass(kind, nn.Module)}


@pytest.mark.parametrize("net", NETS)
def test_every_argument_is_checked(net: type[nn.Module]) -> None:
    for name, parameter in list(inspect.signature(net.__init__).parameters.items())[1:]:
        for value in WRONG:
            if (isinstance(value, str) and "str" in str(parameter.annotation)) or (
                isinstance(value, float) and math.isfinite(value) and "float" in str(parameter.annotation)
            ):
                continue
            with pytest.raises((TypeError, ValueError)) as refusal:
                net(**NETS[net] | {name: value})
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("net", NETS)
def test_scalars_of_numpy_and_torch_are_numbers(net: type[nn.Module]) -> None:
    plain = net(**NETS[net])
    for scalar in (np.int64, torch.tensor):
        made = net(
            **{
                name: tuple(map(scalar, value)) if isinstance(value, tuple) else scalar(value)
                for name, value in NETS[net].items()
            }
        )
        assert made.config == plain.config
        assert repr(made.config) == repr(plain.config)


@pytest.mark.parametrize("net", NETS)
def test_the_outline_on_the_meta_device_has_the_tensors_of_the_net(net: type[nn.Module]) -> None:
    with torch.device("meta"):
        outline = net(**NETS[net])
    plain = net(**NETS[net])
    forms = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in each.state_dict().items()} for each in (outline, plain)
    ]
    assert list(forms[0].items()) == list(forms[1].items())
    assert all(tensor.is_meta for tensor in outline.state_dict().values())
    # Weights of the outline, and nothing but them, make the same net.
    copy = outline.to_empty(device="cpu")
    copy.load_state_dict(plain.state_dict())
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    results = [each.eval().encode(x)[0] if net is VAE else each.eval()(x) for each in (copy, plain)]
    assert torch.equal(*results)
