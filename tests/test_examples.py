"""The examples run as a user runs them, if with few iterations."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", "--quick", cwd=tmp_path)
    assert "mean energy of real digits" in printed
    pictures = {path.name for path in (tmp_path / "runs" / "quickstart").glob("*.png")}
    assert {"samples.png", "strip.png", "curves.png", "quickstart.png", "quickstart_strip.png"} == pictures


def test_own_energy(tmp_path: Path) -> None:
    printed = run("own_energy.py", "--quick", cwd=tmp_path)
    assert "temperature 1" in printed
    noise, samples = (float(part.split()[-1].strip(",")) for part in printed.splitlines()[-1].split(", samples"))
    assert samples < noise


def test_own_generator(tmp_path: Path) -> None:
    printed = run("own_generator.py", "--quick", cwd=tmp_path)
    last = printed.splitlines()[-1]
    assert float(last.split("one pass ")[1].split(";")[0]) < float(last.split("untrained ")[1].split(",")[0])


@pytest.mark.parametrize("name", ["gan_generator.py", "autoregressive_generator.py"])
def test_calibrated_generators(name: str, tmp_path: Path) -> None:
    """Both models are trained, with and without calibration, and judged; far too briefly for one to be the better."""
    lines = run(name, "--iterations", "6", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "calibrated"]
    distances = [float(line.split("distance ")[1].split()[0]) for line in lines]
    assert all(0 < distance < 1000 for distance in distances)
    plain, calibrated = (re.sub(r"\b\d+ s\b", "", line).split(maxsplit=1)[1] for line in lines)
    assert plain != calibrated  # whatever the time, the calibration changed a number


def numbers(line: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.?\d*", line)]


def test_mixture(tmp_path: Path) -> None:
    """Parallel tempering spreads over the modes where plain chains stay in the middle."""
    langevin, tempered = run("mixture.py", "--quick", cwd=tmp_path).splitlines()
    assert numbers(langevin)[0] > 0.9
    assert numbers(tempered)[0] < 0.2
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


def test_uva_mnist(tmp_path: Path) -> None:
    """On random images, which it says, and on a folder with files as MNIST's."""
    lines = run("uva_mnist.py", "--quick", cwd=tmp_path).splitlines()
    assert "random" in lines[0]
    assert lines[-1].startswith("iteration 4")
    assert lines[-1].endswith("80 chains in the buffer")
    pixels = bytes(range(256)) * 49  # 16 images of 28x28
    header = struct.pack(">IIII", 0x803, 16, 28, 28)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 16) + bytes(16))
    lines = run("uva_mnist.py", str(tmp_path), "--quick", cwd=tmp_path).splitlines()
    assert not any("random" in line for line in lines)
    assert lines[-1].endswith("80 chains in the buffer")


def test_joint_classifier(tmp_path: Path) -> None:
    right, agreed = run("joint_classifier.py", "--iterations", "150", cwd=tmp_path).splitlines()
    assert numbers(right)[0] > 60
    assert numbers(agreed)[0] > 60
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_lennard_jones(tmp_path: Path) -> None:
    """Each group of chains comes near its own temperature, and warmer clusters have a higher potential energy."""
    first, *lines = run("lennard_jones.py", "--quick", cwd=tmp_path).splitlines()
    assert -44.33 < numbers(first)[-1] + 13 * 0.01 * 1.1 < -44.0  # without most of the weak pull
    rows = [numbers(line) for line in lines]
    assert [asked for asked, _, _ in rows] == [0.05, 0.1, 0.2, 0.25, 0.3, 0.4]
    assert all(0.6 * asked < measured < 1.1 * asked for asked, measured, _ in rows)
    assert sorted(potential for _, _, potential in rows) == [potential for _, _, potential in rows]


def test_score_posterior(tmp_path: Path) -> None:
    mean, std = run("score_posterior.py", "--quick", cwd=tmp_path).splitlines()
    assert numbers(mean)[-1] < 0.6
    assert 0.9 < numbers(std)[-1] < 1.1


def test_simulation_based_inference(tmp_path: Path) -> None:
    """Even after a short training the posteriors are nearer to the truth than the prior, whose mean error is 0.8."""
    error, ranks = run("simulation_based_inference.py", "--quick", cwd=tmp_path).splitlines()
    assert numbers(error)[-1] < 0.6
    assert 0.3 < numbers(ranks)[0] < 0.7


def test_energy_matching(tmp_path: Path) -> None:
    """The flow of a potential that was trained briefly moves noise towards the data."""
    last = run("energy_matching.py", "--quick", cwd=tmp_path).splitlines()[-1]
    noise, flowed, polished, _ = numbers(last)
    assert flowed < 0.5 * noise
    assert polished < 0.5 * noise


def test_torchebm_model(tmp_path: Path) -> None:
    """Our step behind torchebm's sampler gives the chain of our own sampler."""
    pytest.importorskip("torchebm", reason="torchebm is not installed")
    lines = run("torchebm_model.py", "--quick", cwd=tmp_path).splitlines()
    theirs, behind, ours = (numbers(line)[-2] for line in lines)
    assert abs(behind - ours) < 2e-3
    assert abs(theirs - ours) < 0.2
