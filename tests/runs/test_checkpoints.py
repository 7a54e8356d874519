"""The newest good checkpoint survives whatever happens to those after it."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastebm.runs import checkpoints
from fastebm.runs.checkpoints import Checkpoints, DamagedError, Layout


def saved(folder: Path, *iterations: int, keep: int = 3) -> Checkpoints:
    store = Checkpoints(folder, keep)
    for iteration in iterations:
        store.save(iteration, {"x": torch.full((3,), float(iteration))}, {"seen": iteration})
    return store


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
    }
    Checkpoints(tmp_path / "new").save(12, tensors, {"a": [1, 2], "b": "c"})
    loaded = Checkpoints(tmp_path / "new").load_newest()
    assert loaded is not None
    assert (loaded.iteration, loaded.state) == (12, {"a": [1, 2], "b": "c"})
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)


def test_none_without_a_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "missing").load_newest() is None
    (tmp_path / "notes.txt").write_text("")
    assert Checkpoints(tmp_path).load_newest() is None


def test_the_newest_few_stay(tmp_path: Path) -> None:
    store = saved(tmp_path, 10, 20, 30, 40, keep=2)
    assert store.iterations() == [30, 40]
    assert len(list(tmp_path.iterdir())) == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
def test_damaged_tensors_fall_back_to_the_one_before(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store = saved(tmp_path, 10, 20)
    damage(tmp_path / "iteration-000000020.safetensors")
    with pytest.warns(RuntimeWarning, match="iteration-000000020.* is damaged"):
        loaded = store.load_newest()
    assert loaded is not None
    assert (loaded.iteration, loaded.tensors["x"].tolist()) == (10, [10.0] * 3)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": {}}', '{"sha256": "0", "state": {}}'])
def test_a_damaged_description_falls_back_too(tmp_path: Path, content: str) -> None:
    store = saved(tmp_path, 10, 20)
    (tmp_path / "iteration-000000020.json").write_text(content)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        loaded = store.load_newest()
    assert loaded is not None
    assert loaded.iteration == 10


def test_a_kill_between_the_two_files_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 10)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 20)
    loaded = store.load_newest()
    assert loaded is not None
    assert loaded.iteration == 10
    assert saved(tmp_path, 20).iterations() == [10, 20]


def test_the_newest_up_to_an_iteration(tmp_path: Path) -> None:
    store = saved(tmp_path, 10, 20, 30)
    for last, found in ((30, 30), (29, 20), (10, 10)):
        loaded = store.load_newest(last)
        assert loaded is not None
        assert loaded.iteration == found
    assert store.load_newest(9) is None


def test_a_checkpoint_with_another_state_is_the_newest_and_good(tmp_path: Path) -> None:
    store = saved(tmp_path, 10, 20, 30)
    chosen = store.load_newest(20)
    assert chosen is not None
    store.overwrite_state(chosen, {"seen": 20, "tries": 1})
    assert store.iterations() == [10, 20]
    loaded = store.load_newest()
    assert loaded is not None
    assert (loaded.iteration, loaded.state) == (20, {"seen": 20, "tries": 1})
    assert loaded.tensors["x"].tolist() == [20.0] * 3
    assert not list(tmp_path.glob("*30*"))


def test_a_kill_while_overwriting_a_state_leaves_the_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 10, 20)
    chosen = store.load_newest(10)
    assert chosen is not None

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            store.overwrite_state(chosen, {"seen": 10, "tries": 1})
    newest = store.load_newest()
    assert newest is not None
    assert newest.iteration == 20


def test_numbers_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    store = saved(tmp_path, 10)
    for iteration, value in ((20, math.nan), (30, math.inf)):
        store.save(iteration, {"x": torch.tensor([1.0, value]), "count": torch.tensor(3)}, {})
    with pytest.warns(RuntimeWarning, match="000030.* is damaged .the numbers of its tensor 'x' are not finite"):
        newest = store.load_newest()
    assert newest is not None
    assert newest.iteration == 10
    (tmp_path / "iteration-000000010.json").unlink()
    with pytest.raises(DamagedError, match=r"iteration-000000030.safetensors: the numbers of its tensor 'x'"):
        store.load_newest()


def test_a_changed_description_is_noticed_and_an_old_one_has_no_digest(tmp_path: Path) -> None:
    store = saved(tmp_path, 10)
    path = tmp_path / "iteration-000000010.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"state": {"seen": 11}}))
    with pytest.raises(DamagedError, match="does not have the digest that it names"):
        store.load_newest()
    del content["description_sha256"]
    path.write_text(json.dumps(content))
    newest = store.load_newest()
    assert newest is not None
    assert newest.state == {"seen": 10}
    path.rename(tmp_path / "iteration-000000020.json")
    (tmp_path / "iteration-000000010.safetensors").rename(tmp_path / "iteration-000000020.safetensors")
    with pytest.raises(DamagedError, match="is of iteration 10"):
        store.load_newest()


@pytest.mark.parametrize("name", ["iteration-000000020.json", "iteration-000000020.safetensors"])
def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = saved(tmp_path, 10, 20)
    opened = Path.open

    def refusing(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refusing)
        with pytest.raises(OSError, match="Input/output error"):
            store.load_newest()
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError):
        store.load_newest()


def test_a_good_checkpoint_is_kept_beside_newer_damaged_ones(tmp_path: Path) -> None:
    store = saved(tmp_path, 10, 20, 30, 40, keep=4)
    for iteration in (20, 30, 40):
        cut(tmp_path / f"iteration-{iteration:09d}.safetensors")
    store.keep = 3
    store.save(15, {"x": torch.zeros(3)}, {})
    with pytest.warns(RuntimeWarning, match="is damaged"):
        newest = store.load_newest()
    assert newest is not None
    assert newest.iteration == 15
    assert store.iterations() == [10, 15, 20, 30, 40]


def test_a_checkpoint_that_vanishes_while_it_is_read_was_replaced_by_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 10, keep=1)
    listed = Checkpoints.iterations
    calls = []

    def training_goes_on(self: Checkpoints) -> list[int]:
        found = listed(self)
        if not calls:
            calls.append(True)
            saved(tmp_path, 20, keep=1)
        return found

    monkeypatch.setattr(Checkpoints, "iterations", training_goes_on)
    newest = store.load_newest()
    assert newest is not None
    assert newest.iteration == 20


def test_a_checkpoint_is_not_saved_where_its_run_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        saved(tmp_path / "gone" / "checkpoints", 10)
    assert not (tmp_path / "gone").exists()


def test_a_layout_names_what_does_not_fit() -> None:
    meta = torch.device("meta")
    moments = {"a.0.step": torch.empty((), device=meta), "a.0.exp_avg": torch.empty(3, device=meta)}
    layout = Layout({"w": torch.empty(2, 3, device=meta)}, [moments])
    good = {"w": torch.zeros(2, 3)}
    layout.check(good)
    layout.check(good | {"a.0.step": torch.zeros(()), "a.0.exp_avg": torch.zeros(3)})
    for tensors, message in (
        ({}, "it lacks the tensor w"),
        ({"w": torch.zeros(3, 2)}, r"its tensor w is float32 \(3, 2\), and the config's float32 \(2, 3\)"),
        ({"w": torch.zeros(2, 3).double()}, r"its tensor w is float64 \(2, 3\), and the config's float32 \(2, 3\)"),
        (good | {"more": torch.zeros(1)}, "its tensor 'more' is none of this run"),
        (good | {"a.0.step": torch.zeros(())}, "it lacks the tensor a.0.exp_avg"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.check(tensors)
