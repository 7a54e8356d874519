"""The page of a run: every method, whatever state the run is in, hostile texts, damaged files."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastebm
from fastebm.cli import main
from fastebm.data import Images, digits, to_pixels
from fastebm.evaluation import train_features
from fastebm.report import write_report
from fastebm.report.page import PICTURE_BYTES
from fastebm.report.pictures import PictureError, Pictures
from fastebm.runs.files import write_json
from fastebm.runs.folder import RunError, RunFolder
from fastebm.training import CoarseToFineConfig, DigitsSource, DivergedError, train
from fastebm.training.trainer.flight import FlightRecorder, records, write_record
from tests.cli.tiny_runs import TRAIN, start
from tests.report.conftest import CONFIGS, STAGES
from tests.report.html_check import Page, without_date

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% if %}\u202e\x07"


def page_of(run: Path, out: Path | None = None) -> Page:
    """The page of a run, without faults."""
    page = Page(write_report(run, out, overwrite=True).read_text(encoding="utf-8"))
    assert page.faults == []
    return page


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other parts: curves take most of the time of a page."""
    monkeypatch.setattr("fastebm.report.run.draw_curves", lambda log, pictures: ())


# Every method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_finished_run(run_of: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    run, before = run_of(kind), sorted(run_of(kind).rglob("*"))
    page = page_of(run, tmp_path / "page.html")
    total = CONFIGS[kind].total_iterations
    assert f"finished: {total} of {total} updates" in page.text
    assert f"fastebm train {kind.replace('_', '-')}" in page.text
    assert "scikit-learn's handwritten digits" in page.text
    assert f"torch {torch.__version__}" in page.text
    assert "1 CPU thread" in page.text
    assert "The guard never went back" in page.text
    captions = [re.sub(r"\W.*", "", image["alt"]) for image in page.images]
    assert captions.count("A") + captions.count("Chains") + captions.count("Grids") >= 2  # samples and more
    curves = [image["alt"] for image in page.images if "over the updates" in image["alt"]]
    last = RunFolder(run).log.lines()[-1]
    assert any(f"At the end: learning rate {last['learning_rate']:.4g}" in alt for alt in curves)
    if "gap" in last:
        assert f"Gap, chain ends minus real images, over the updates. At the end: gap {last['gap']:.4g}." in curves
    assert ("fastebm diagnose" in page.text) == (kind == "coarse_to_fine")
    assert f"fastebm evaluate {run} --train-features" in page.text
    assert sorted(run.rglob("*")) == before  # nothing is written into the folder but the page


@pytest.mark.parametrize("kind", CONFIGS)
def test_its_program_runs(run_of: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    page = page_of(run_of(kind), tmp_path / "page.html")
    program = re.search(r"import fastebm run = fastebm\.load\('[^']*'\) images = run\.sample\(16, seed=1\)( energies = "
                        r"run\.energy\(images\))?", page.text)  # fmt: skip
    assert program
    names: dict[str, object] = {}
    exec(re.sub(r" (?=run =|images =|energies =)", "\n", program[0]), names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert ("energies" in names) == (kind != "ec_posterior")


def test_pictures_are_those_of_the_run(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("coarse_to_fine")
    page = page_of(run, tmp_path / "page.html")
    found = {base64.b64decode(image["src"].partition(",")[2]) for image in page.images}
    for name in ("samples.png", "strip.png", "pictures/iteration-000000002.png", "pictures/iteration-000000005.png"):
        assert (run / name).read_bytes() in found


def test_two_pages_of_one_folder_are_the_same_but_for_the_date(run: Path) -> None:
    texts = []
    for name in ("report.html", "report.html", "other.html", "other.html"):  # which the folder does not have at first
        page_of(run, run / name)
        texts.append(without_date((run / name).read_text()))
    assert texts == [texts[0]] * 4


def test_drawings_follow_light_and_dark(run: Path) -> None:
    drawings = [image["src"] for image in page_of(run).images if "svg" in image["src"][:20]]
    assert len(drawings) >= 5
    for source in drawings:
        text = base64.b64decode(source.partition(",")[2]).decode()
        assert "prefers-color-scheme:dark" in text
        assert "currentColor" in text
        assert not re.findall("(?:href|src|url)=?[(\"'](?!#)[^\"')]*", text)


# States of a run ------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_and_the_resumed_one(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("coarse_to_fine"), tmp_path / "it's mine"))
    for path in (run / "checkpoints").glob("iteration-000000005*"):
        path.unlink()
    RunFolder(run).log.rewind(4)
    page = page_of(run)
    assert "unfinished: 4 of 5 updates" in page.text
    assert "Newest checkpoint after 4 updates" in page.text
    quoted = str(run).replace("'", "'\"'\"'")
    assert f"fastebm resume '{quoted}'" in page.text
    assert main(["resume", str(run)]) == 0
    assert "finished: 5 of 5 updates" in page_of(run).text


def test_a_run_without_updates(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", STAGES.kind, dataclasses.asdict(STAGES))
    page = page_of(tmp_path / "run")
    assert "unfinished: 0 of 5 updates" in page.text
    assert "The log has no line yet." in page.text
    assert "tensors, which the folder does not describe" in page.text
    assert "There is no trained checkpoint yet" in page.text
    assert "No picture of samples has been drawn yet" in page.text
    assert page.images == []


def test_a_killed_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*TRAIN, "--iterations", "3", "100000", "--out", str(run), cwd=tmp_path)
    try:
        while process.poll() is None and not (RunFolder.is_run(run) and RunFolder(run).log.last()):
            time.sleep(0.05)
        page = page_of(run, tmp_path / "meanwhile.html")  # while it trains
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert "unfinished: " in page.text
    assert "of 100,003 updates" in page_of(run).text


def test_a_run_that_the_guard_rolled_back(run: Path, no_curves: None) -> None:
    """Notes of the log, and each record with its picture and its diagnosis."""
    log = RunFolder(run).log
    lines = log.lines()
    log.path.unlink()
    for line in lines:
        later = {"attempt": 2} | (
            {"note": "The guard went back from 4 to 3: a reason."} if line["iteration"] == 4 else {}
        )
        log.append(line | (later if line["iteration"] >= 4 else {}))
    recorder = FlightRecorder(10)
    for iteration in range(4, 8):
        recorder.begin({"iteration": iteration})
        recorder.finish({"gap": 0.1})
        write_record(run, recorder.record(), "the guard went back", f"reason {iteration}")
    page = page_of(run)
    assert "The run went back to an earlier checkpoint 2 times" in page.text
    assert "Note at update 4 : The guard went back from 4 to 3: a reason." in page.text
    told = [json.loads(path.read_text()) for path in records(run)]
    for content in told:
        assert f"the guard went back : {content['reason']} (" in page.text
        assert content["diagnosis"] in page.text
    assert page.text.index("reason 7") < page.text.index("reason 4")
    assert sum("The last updates before" in image["alt"] for image in page.images) == 3  # the newest ones
    records(run)[-1].write_text("{")
    records(run)[-2].with_suffix(".png").unlink()
    text = page_of(run).text
    assert "The flight record iteration-000000007-1.json is damaged: " in text
    assert "The picture of the flight record iteration-000000006-1 is missing." in text


def test_a_run_that_the_guard_gave_up(tmp_path: Path) -> None:
    config = dataclasses.replace(STAGES, max_energy=1e-6, retries=1)
    with pytest.warns(RuntimeWarning, match="Back to iteration 0"), pytest.raises(DivergedError):
        train(config, DigitsSource(), tmp_path / "run", progress=False)
    page = page_of(tmp_path / "run")
    assert "given up by the guard: 0 of 5 updates" in page.text
    assert f"fastebm resume {tmp_path / 'run'} --retries 4" in page.text
    assert "the guard gave the run up" in page.text
    assert "the guard went back" in page.text
    assert "The run went back to an earlier checkpoint 1 time." in page.text  # its log has no line
    assert "The guard never went back" not in page.text


def test_a_run_without_pictures(run: Path) -> None:
    for path in run.glob("*.png"):
        path.unlink()
    shutil.rmtree(run / "pictures")
    page = page_of(run)
    assert "No picture of samples has been drawn yet" in page.text
    assert all("over the updates" in image["alt"] for image in page.images)
    assert page.images


# Judgement and chains -------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_evaluate_and_diagnose(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, held_out = (Images(to_pixels(images), labels) for images, labels in (digits("train"), digits("test")))
    train_features(real, held_out, images_seen=2000).save(run / "features.safetensors")
    assert main(["evaluate", str(run), "--count", "12"]) == 0
    assert main(["diagnose", str(run), "--count", "6"]) == 0
    printed = capsys.readouterr().out
    page = page_of(run)
    assert "The samples have not been compared" not in page.text
    stored = json.loads((run / "evaluation.json").read_text())
    numbers = {float(number) for number in re.findall('<data value="([^"]*)">', page.source)}

    def leaves(value: object, name: str = "") -> dict[str, float]:
        if isinstance(value, dict):
            return {key: leaf for n, v in value.items() for key, leaf in leaves(v, f"{name}/{n}").items()}
        return {name: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}

    shown = {name for name, value in leaves(stored).items() if value in numbers}
    hidden = leaves(stored).keys() - shown
    assert len(shown) > 30
    assert {name for name in hidden if not name.endswith("_std")} == set()  # whatever is nothing but rounding
    for row in ("samples", "reference", "noise"):
        frechet = stored["in_features"]["distances"][row]["frechet"]
        assert f"{frechet:.4g}" in printed
        assert f'<data value="{frechet!r}">{frechet:.4g}</data>' in page.source
    diagnosis = json.loads((run / "diagnose.json").read_text())
    for size, level in diagnosis["levels"].items():
        assert f"{size} {' '.join(level['verdict'])}" in page.text
        assert " ".join(level["table"].split()) in page.text
        assert all(f"  - {sentence}\n" in printed for sentence in level["verdict"])
    assert any("Traces of chains" in image["alt"] for image in page.images)


def test_a_judgement_of_an_earlier_iteration_says_so(run: Path) -> None:
    write_json(run / "evaluation.json", {"samples": "9 of run, iteration 1,002", "real": "digits", "gap": 1.5})
    write_json(run / "diagnose.json", {"iteration": 4, "levels": {}})
    text = page_of(run).text
    assert "These samples are of iteration 1,002; the newest checkpoint is of iteration 5." in text
    assert "These chains are of iteration 4; the newest checkpoint is of 5." in text


# Texts and files that lie ---------------------------------------------------------------------------------------------


def test_hostile_texts_are_shown_and_not_obeyed(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("coarse_to_fine"), tmp_path / "-<img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}"))
    content = json.loads((run / "config.json").read_text())
    content["images"] = {"path": HOSTILE, "size": 8}
    content["versions"]["torch"] = content["machine"] = HOSTILE
    write_json(run / "config.json", content)
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"note": HOSTILE, HOSTILE: 1.0})
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    write_json(run / "evaluation.json", {HOSTILE: HOSTILE, "samples": HOSTILE, "deep": {HOSTILE: {HOSTILE: [HOSTILE]}}})
    write_json(run / "diagnose.json", {"iteration": 5, "levels": {HOSTILE: {"verdict": [HOSTILE], "table": HOSTILE}}})
    (run / "<img src=y>").touch()
    (run / "flight").mkdir()
    record = dict.fromkeys(("event", "reason", "diagnosis", "note"), HOSTILE) | {"updates": [{"iteration": 1}]}
    write_json(run / "flight" / "iteration-000000001-1.json", record)
    page = page_of(run)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    assert page.text.count(shown) >= 12
    assert "\u202e" not in page.source
    assert "\x07" not in page.source
    assert "<img src=y>" in page.text
    for image in page.images:
        assert "<script" not in base64.b64decode(image["src"].partition(",")[2]).decode(errors="replace")


def test_a_folder_whose_name_is_no_text(run: Path) -> None:
    moved = run.with_name("\udcff-run")
    run.rename(moved)
    assert "\\udcff-run" in page_of(moved).text


def test_a_damaged_log(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[1] = lines[1][:20]
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"iteration": 9')
    page = page_of(run)
    assert "A line of the log is left out: line 2 of" in page.text
    assert any(image["alt"].startswith("Gap") for image in page.images)
    (run / "log.jsonl").write_text("what\n" * 100)
    page = page_of(run)
    assert page.text.count("A line of the log is left out") == 5
    assert "There are more of these." in page.text
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").mkdir()
    assert "The log can't be read" in page_of(run).text
    (run / "log.jsonl").rmdir()
    os.mkfifo(run / "log.jsonl")
    os.rename(run / "samples.png", run / "kept")
    os.mkfifo(run / "samples.png")
    page = page_of(run)
    assert "log.jsonl can't be read: it is not a file" in page.text
    assert "samples.png can't be shown: it is not a file" in page.text


@pytest.mark.parametrize("attempt", [math.nan, math.inf, 1.5])
def test_an_attempt_that_is_no_number(run: Path, attempt: object) -> None:
    log = RunFolder(run).log
    log.append(log.lines()[-1] | {"iteration": 10**6, "attempt": attempt})
    assert "The last line of the log is damaged: attempt" in page_of(run).text


@pytest.mark.parametrize("guard", [None, {"rollbacks": None}])
def test_a_checkpoint_that_does_not_say_what_the_guard_did(run: Path, guard: object) -> None:
    checkpoints = RunFolder(run).checkpoints
    newest = checkpoints.load_newest()
    assert newest is not None
    checkpoints.overwrite_state(newest, newest.state | {"guard": guard})
    text = page_of(run).text
    assert "The checkpoints do not say how often the guard went back: in the newest checkpoint " in text
    assert "Nothing says yet whether the guard went back." in text
    assert "never went back" not in text


def test_records_that_can_not_be_read_do_not_hide_the_others(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    recorder = FlightRecorder(10)
    for iteration in (4, 5):
        recorder.begin({"iteration": iteration})
        recorder.finish({"gap": 0.1})
        write_record(run, recorder.record(), "the guard went back", f"reason {iteration}")
    (run / "flight" / "iteration-000000009-1.json").mkdir()
    assert "The run went back to an earlier checkpoint 2 times." in page_of(run).text


def test_numbers_that_are_none(run: Path) -> None:
    """What explodes is drawn as far as it can be."""
    log = RunFolder(run).log
    lines = log.lines()
    log.path.unlink()
    for line, gap in zip(lines, (math.nan, math.inf, -1e308, 1e308, 0.5), strict=True):
        log.append(line | {"gap": gap, "loss": math.nan, "energy_data": gap})
    assert any(image["alt"].endswith("gap 0.5.") for image in page_of(run).images)


@pytest.mark.parametrize("name", ["evaluation.json", "verdict.json", "judged.json", "diagnose.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"kind": 3, "levels": [], "samples": {"a": 1e999}}'])
def test_a_damaged_json_file(run: Path, name: str, content: bytes, no_curves: None) -> None:
    (run / name).write_bytes(content)
    page = page_of(run)
    if content.startswith(b"{") and len(content) > 1 and name not in ("diagnose.json", "config.json"):
        assert "All of these numbers are in" in page.text or "can't be read" in page.text
    else:
        assert "can't be read: " in page.text


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n" + bytes(50), None])
def test_a_damaged_picture(run: Path, content: bytes | None, no_curves: None) -> None:
    whole = (run / "samples.png").read_bytes()
    (run / "samples.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    page = page_of(run)
    assert "samples.png can't be shown: " in page.text
    assert any("Chains of the run" in image["alt"] for image in page.images)


def test_settings_that_differ_come_first(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    page = page_of(run_of("coarse_to_fine"), tmp_path / "page.html")
    differing, _, rest = page.text.partition(f"All {len(dataclasses.fields(CoarseToFineConfig))} settings")
    assert "These differ from the preset digits , the nearest one." in differing
    assert " base_width 1 8 " in differing
    assert " step_size " not in differing
    assert " step_size 1 " in rest


def test_a_large_log_and_many_pictures_stay_small(run: Path) -> None:
    from PIL import Image

    line = RunFolder(run).log.lines()[-1]
    with (run / "log.jsonl").open("w") as file:
        for number in range(20_000):
            wave = {"gap": math.sin(number), "loss": math.cos(number), "energy_data": math.sin(number / 7)}
            file.write(json.dumps(line | {"iteration": number} | wave) + "\n")
    noise = torch.randint(0, 256, (1500, 2500, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("samples.png", "strip.png", *(f"pictures/iteration-{number:09d}.png" for number in range(9))):
        Image.fromarray(noise.numpy()).save(run / name, compress_level=1)
    assert (run / "samples.png").stat().st_size > 10**7
    page = page_of(run)
    assert all(int(image["width"]) <= 1600 for image in page.images)
    assert [image["alt"] for image in page.images if "over the updates" in image["alt"]][6].startswith("Pixels")
    assert len([image for image in page.images if image["width"] == "640"]) == 6
    assert (run / "report.html").stat().st_size < PICTURE_BYTES + 200_000
    pictures = Pictures(100)
    with pytest.raises(PictureError, match="left out, so that the page stays small"):
        pictures.read(run / "samples.png", "", "")


# Where it is written --------------------------------------------------------------------------------------------------


def test_the_command_says_the_size_and_replaces_nothing_unasked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert re.fullmatch(rf"{run}/report\.html: [\d.]+ KiB, one page .*\n", capsys.readouterr().out)
    (run / "report.html").write_text("precious")
    assert main(["report", str(run)]) == 2
    assert f"{run / 'report.html'} exists: --overwrite replaces it" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "precious"
    assert main(["report", str(run), "--overwrite"]) == 0
    assert Page((run / "report.html").read_text()).faults == []
    assert not [path for path in run.iterdir() if path.name.endswith(".part")]


def test_a_read_only_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.chmod(0o555)
    if os.access(run, os.W_OK):  # root may write anywhere: then let the system say what it says to others
        probe = fastebm.runs.files.probe

        def refused(folder: Path) -> None:
            if folder == run:
                raise PermissionError(13, "Permission denied", str(folder))
            probe(folder)

        monkeypatch.setattr("fastebm.runs.files.probe", refused)
    try:
        with pytest.raises(ValueError, match=r"report.html can't be written: Permission denied"):
            write_report(run)
        assert "finished: 5 of 5" in page_of(run, tmp_path / "page.html").text
    finally:
        run.chmod(0o755)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("made", ["missing", "empty", "file", "deeper"])
def test_what_is_no_run_is_one_line(run: Path, made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = {"missing": tmp_path / "no", "empty": tmp_path / "empty", "file": run / "log.jsonl", "deeper": tmp_path}[
        made
    ]
    (tmp_path / "empty").mkdir()
    assert main(["report", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fastebm: ")
    assert errors.count("\n") == 1
    assert "is not a run of fastebm" in errors
    with pytest.raises(RunError):
        write_report(path)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--out", "page.htm"], "--out must end in .html, got page.htm"),
    (["--out", "missing/page.html"], "the folder missing of page.html does not exist"),
    (["--count", "3"], "--count"),
])  # fmt: skip
def test_wrong_arguments(
    run: Path, arguments: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_training_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*TRAIN, "--iterations", "1", "1", "--out", str(out)]) == 0
    assert f"fastebm report {out} makes one page of all this." in capsys.readouterr().out
    assert main(["report", str(out)]) == 0
