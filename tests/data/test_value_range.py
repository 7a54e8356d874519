"""Values of images from elsewhere: what range they show, and what is refused because they show none."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastebm.data import to_float
from fastebm.data.value_range import ValueRange, to_signed

SIGNED = torch.linspace(-1, 1, 256)


@pytest.mark.parametrize(
    ("given", "value_range", "tolerance"),
    [
        (SIGNED, None, 0),
        (SIGNED, (-1, 1), 0),
        (SIGNED.double(), None, 1e-7),
        (SIGNED.half(), None, 1e-3),
        (SIGNED.bfloat16(), None, 1e-2),
        ((SIGNED + 1) / 2, (0, 1), 1e-6),
        ((SIGNED + 1) * 127.5, (0, 255), 1e-6),
        (torch.arange(256, dtype=torch.uint8), None, 1e-6),
        (torch.arange(256), (0, 255), 1e-6),
        (torch.arange(256).to(torch.int16), (0.0, 255.0), 1e-6),
        (torch.arange(0, 256 * 257, 257).to(torch.uint16), (0, 65535), 1e-6),
        (torch.tensor([1.0 + 1e-6, -1.001]), None, 2e-3),
    ],
)
def test_all_ranges_are_brought_to_one(given: Tensor, value_range: ValueRange | None, tolerance: float) -> None:
    signed = to_signed(given, value_range)
    assert signed.dtype == torch.float32
    assert signed.abs().max() <= 1
    expected = SIGNED if len(given) == 256 else torch.tensor([1.0, -1.0])
    assert (signed - expected).abs().max() <= tolerance


def test_bytes_are_the_pixels_of_this_library() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    for value_range in (None, (0, 255)):
        assert torch.equal(to_signed(pixels, value_range), to_float(pixels))


@pytest.mark.parametrize(
    ("given", "value_range", "message"),
    [
        (torch.rand(9), None, r"may be meant in \[0, 1\] or in \[-1, 1\].*--range 0 1 or --range -1 1"),
        (torch.tensor([-0.1, 1.001]), None, "may be meant in"),  # a little beyond [0, 1], as after bicubic resizing
        (torch.zeros(3), None, "may be meant in"),
        (torch.tensor([0, 1], dtype=torch.uint8), None, "bytes of 0 and 1 alone.*--range 0 1 or --range 0 255"),
        (torch.tensor([0, 255]), None, "are int64 from 0 to 255.*--range"),
        (torch.tensor([-1.0, 1.01]), None, r"lie in \[-1, 1\], got values from -1 to 1.01.*--range"),
        (torch.tensor([0.0, 255.0]), None, "got values from 0 to 255.*--range"),
        (torch.tensor([0.0, 255.0]), (0, 1), r"lie in \[0, 1\], got values from 0 to 255"),
        (torch.tensor([-1.0, 1.0]), (0, 1), r"lie in \[0, 1\]"),
        (torch.tensor([-1.0, torch.nan]), None, "finite"),
        (torch.tensor([-1.0, torch.inf]), (-1, 1), "finite"),
        (torch.zeros(0, 1, 4, 4), None, "must not be empty"),
        (SIGNED, (1, -1), "black < white"),
        (SIGNED, (0, torch.inf), "must be finite"),
        (SIGNED, (torch.nan, 1), "must be finite"),
    ],
)
def test_values_that_do_not_say_what_they_mean_are_refused(
    given: Tensor, value_range: ValueRange | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        to_signed(given, value_range, "x.npz: samples")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", [torch.zeros(3, dtype=torch.bool), torch.zeros(3) + 1j, np.zeros(3)])
def test_what_is_no_real_number_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match="images must be a tensor of real numbers"):
        to_signed(given)  # type: ignore[arg-type]
