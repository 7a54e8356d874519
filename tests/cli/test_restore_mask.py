"""`fastebm restore --mask`: pixels that a picture hides, any of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastebm.cli import main
from fastebm.data import digits

MASK = np.zeros((8, 8), np.uint8)
MASK[1:4, 2:7] = 255
MASK[6, 0] = 255


def picture(path: Path, pixels: np.ndarray) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def test_known_pixels_stay_and_hidden_ones_are_not_read(digits_run: Path, tmp_path: Path) -> None:
    mask = picture(tmp_path / "mask.png", MASK)
    out = tmp_path / "restored"
    command = ["restore", str(digits_run), "--count", "3", "--restarts", "1", "--out", str(out)]
    assert main([*command, "--task", "inpaint-mask", "--mask", mask]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["mask"] == mask
    assert results["measures"]["restored"]["residual_rms"] < 1e-6
    images, originals = torch.from_numpy(np.load(out / "restored.npz")["images"]), digits("test")[0][:3]
    hole = torch.from_numpy(MASK > 0)
    assert torch.equal(images[..., ~hole], originals[..., ~hole])
    assert not torch.isclose(images[..., hole], originals[..., hole]).all()

    # The same pictures with their hidden pixels gone are restored to the same.
    pixels = ((originals[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    for name, shown in (("whole", pixels), ("damaged", np.where(MASK > 0, 200, pixels).astype(np.uint8))):
        np.savez(tmp_path / f"{name}.npz", x_train=shown)
        data = ["--data", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / name)]
        assert main([*command, "--task", "inpaint-mask", "--mask", mask, *data]) == 0
    whole, damaged = (np.load(tmp_path / name / "restored.npz")["images"] for name in ("whole", "damaged"))
    assert np.array_equal(whole, damaged)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "inpaint-mask"], "--task inpaint-mask needs --mask FILE"),
        (["--task", "inpaint-mask+colorization"], "--task inpaint-mask needs --mask FILE"),
        (["--mask", "mask.png"], "--mask is for --task inpaint-mask, alone, and the task is super-resolution-2"),
        (["--mask", "mask.png", "--task", "inpaint-mask+colorization"], "--mask is for --task inpaint-mask, alone"),
        (["--mask", "wide.png", "--task", "inpaint-mask"], "wide.png: the mask is 8x9, and the images are 8x8"),
        (["--mask", "white.png", "--task", "inpaint-mask"], "white.png: this mask hides all of the image"),
        (["--mask", "black.png", "--task", "inpaint-mask"], "black.png: this mask hides nothing"),
        (["--mask", "nowhere.png", "--task", "inpaint-mask"], "nowhere.png"),
        (["--mask", "text.png", "--task", "inpaint-mask"], "text.png"),
    ],
)
def test_wrong_masks(
    digits_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    masks = {"mask": MASK, "wide": np.zeros((8, 9), np.uint8), "white": np.full_like(MASK, 255), "black": 0 * MASK}
    for name, pixels in masks.items():
        picture(tmp_path / f"{name}.png", pixels)
    Path("text.png").write_text("no picture")
    assert main(["restore", str(digits_run), "--out", str(tmp_path / "new"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()
