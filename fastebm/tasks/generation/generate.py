"""Any number of samples of a run, to files: resumable, by several processes, as fast as the sampler.

Sample i is the end of chain `first + i`, so that it does not matter who draws it and when: chunks of chains are drawn
in any order by any number of processes, and a killed call is taken up at the chunks that are missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fastebm import rng
from fastebm.data import to_pixels
from fastebm.tasks.generation.files import GridFile, Output, PictureFolder, Pixels, Request, output_for
from fastebm.training import CoarseToFineRun, RunError

CHUNK_PIXELS = 256 * 32**2
QUEUED = 2
LARGEST_GRID = 10_000


@dataclass(frozen=True)
class GenerationResult:
    """What a call has made.

    Attributes:
        path: the folder or file.
        request: what the samples depend on.
        drawn: how many samples were drawn by this call; the others were there.
        seconds: that this call took for them, to the last file, with the start of processes; the run was loaded before.
        numbers: the file that says so, and what the samples depend on.
    """

    path: Path
    request: Request
    drawn: int
    seconds: float
    numbers: Path

    @property
    def images_per_second(self) -> float | None:
        """Of this call; None where all were there."""
        return self.drawn / self.seconds if self.drawn else None


def generate(
    run_dir: str | Path,
    count: int,
    out: str | Path,
    *,
    seed: int | None = None,
    processes: int = 1,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> GenerationResult:
    """Draws `count` samples of the run in a folder, and writes them to `out`, as bytes: round((x + 1) * 127.5).

    A call that was killed or failed goes on when it is made again, with the checkpoint that it began with, and ends
    with the same files. With the fused engine these are the same bits for any number of processes and threads. Samples
    are those of `CoarseToFineRun.sample`. Last it writes numbers as JSON: what was asked for, the sampler's settings,
    seconds, images a second; to `numbers.json` in a folder, beside a file to its whole name with .json behind it.

    Args:
        run_dir: folder of the run, finished or not.
        out: a folder for 000000.png, 000001.png and so on; a .npz for an array "images", uint8 (N, S, S, C); a .png for
            a grid of all, at most 10,000.
        seed: other seeds, other samples; by default those that continue the run's own noise.
        processes: each draws its share of chunks, on its share of the CPU threads; on a machine with several GPUs, in
            turns on each. With more than one, a script needs the usual `if __name__ == "__main__":`.
        chunk: how many chains run at a time; by default 256 at up to 32x32, and as many pixels above. A kill loses at
            most three such chunks of each process: the one being drawn, and two that wait to be written.
        device: cpu or cuda; by default a GPU if there is one.
        overwrite: begins anew where something else was begun, and replaces what an earlier call made.
        progress: shows a bar.

    Raises:
        ValueError: for numbers out of range, a path that can't be taken, or something that may not be overwritten.
        RunError: where there is no run, its checkpoint has gone meanwhile, chains are not finite, a process dies, or
            nothing can be written: what was done before stays.
    """
    output = output_for(Path(out))
    _check_numbers(count, processes, chunk, output)
    _check_folder(output)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    # Before anything is made: a mistake must not leave a folder behind.
    run = _run_of(run_dir, output, device, overwrite)
    request = _request(run, count, seed, chunk)
    if isinstance(output, PictureFolder | GridFile) and request.channels not in (1, 3):
        raise ValueError(f"a PNG has 1 or 3 channels, the run's images have {request.channels}: write an .npz")
    output.check(request, overwrite)
    with _writing(output, request), output.locked():
        output.begin(request, overwrite)
        start = time.perf_counter()
        missing = sorted(set(range(request.chunks)) - output.done())
        processes = max(1, min(processes, len(missing)))
        with _bar(request, missing, progress) as advance:
            if processes == 1:
                _draw_chunks(run, request, output, missing, advance)
            else:
                _share(Path(run_dir), request, output, missing, processes, device, advance)
        output.finish(request)
        drawn = sum(len(request.rows(number)) for number in missing)
        made = GenerationResult(output.path, request, drawn, time.perf_counter() - start, output.numbers)
        output.close(_numbers(made, run, processes, device))
    return made


def _draw_chunks(
    run: CoarseToFineRun, request: Request, output: Output, chunks: Iterable[int], advance: Callable[[int], None]
) -> None:
    """Draws chunks and has each written while the next is drawn; at most QUEUED wait to be written."""
    cascade = run.cascade()  # one for all chunks: its gradients are captured once
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "write samples") as writer:
        for chunk in chunks:
            rows = request.rows(chunk)
            samples = cascade.sample(
                len(rows), request.seed, request.first_chain + rows.start, channels=request.channels
            )
            pixels = to_pixels(samples).permute(0, 2, 3, 1).contiguous().cpu().numpy()
            if len(writing) == QUEUED:
                writing.popleft().result()
            writing.append(writer.submit(_write, output, request, chunk, pixels, advance))
            _stop_without_parent()
        for written in writing:
            written.result()


def _write(output: Output, request: Request, chunk: int, pixels: Pixels, advance: Callable[[int], None]) -> None:
    output.write(request, chunk, pixels)
    advance(len(pixels))


def _share(
    run_dir: Path,
    request: Request,
    output: Output,
    chunks: Sequence[int],
    processes: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Draws chunks by several processes, no more than there are chunks, every so-manieth by each."""
    context = multiprocessing.get_context("spawn")  # a fork can't use a GPU, nor OpenMP's threads
    threads = max(1, torch.get_num_threads() // processes)
    workers = []
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (run_dir, request, output, chunks[number::processes], _device_of(device, number), threads)
            process = context.Process(target=_work, args=(*arguments, sender), daemon=True)
            process.start()
            sender.close()  # ours, so that the end of the process is the end of the pipe
            workers.append((process, receiver))
        _follow([receiver for _, receiver in workers], advance)
    finally:
        for process, _ in workers:
            process.terminate()
            process.join()


def _follow(receivers: list[Connection], advance: Callable[[int], None]) -> None:
    """Passes on how many samples were written, until all processes say that they have ended.

    Raises what one of them raised, and RunError where one ends without a word.
    """
    while receivers:
        for receiver in wait(receivers):
            assert isinstance(receiver, Connection)
            try:
                said = receiver.recv()
            except EOFError:
                raise RunError(
                    "a process that draws samples was killed; the system may lack memory for so many"
                ) from None
            if isinstance(said, Exception):
                raise said
            if said is None:
                receivers.remove(receiver)
            else:
                advance(said)


def _work(
    run_dir: Path,
    request: Request,
    output: Output,
    chunks: Sequence[int],
    device: torch.device,
    threads: int,
    sender: Connection,
) -> None:
    """What a process does: its chunks, saying how many samples were written, and None or an error at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    torch.set_num_threads(threads)
    try:
        run = CoarseToFineRun.load(run_dir, device, iteration=request.iteration)
        _draw_chunks(run, request, output, chunks, sender.send)
        sender.send(None)
    except Exception as error:
        with contextlib.suppress(OSError):  # where the first process has gone, nobody listens
            sender.send(error)


def _stop_without_parent() -> None:
    """Ends a process whose parent was killed: somebody may take its work up elsewhere."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)


def _run_of(run_dir: str | Path, output: Output, device: torch.device, overwrite: bool) -> CoarseToFineRun:
    """The run as the output was begun with it, or as its newest checkpoint has it."""
    there = None if overwrite else output.begun()
    iteration = None if there is None else there.get("iteration")
    try:
        return CoarseToFineRun.load(run_dir, device, iteration=iteration)
    except RunError as error:
        if iteration is None:
            raise
        raise RunError(f"{output.path} can't be gone on with: {error}. --overwrite begins anew") from error


def _request(run: CoarseToFineRun, count: int, seed: int | None, chunk: int | None) -> Request:
    config, size = run.config, run.size
    request = Request(
        iteration=run.iteration,
        weights=_digest(run),
        sampler=f"{run.cascade()!r}, {config.dtype}, engine {config.engine}",
        seed=config.seed if seed is None else seed,
        first_chain=config.total_chains if seed is None else 0,
        count=count,
        chunk=chunk or max(1, CHUNK_PIXELS // max(32, size) ** 2),
        channels=config.channels,
        size=size,
    )
    rng.make_key(request.seed)
    return request


def _numbers(made: GenerationResult, run: CoarseToFineRun, processes: int, device: torch.device) -> dict[str, Any]:
    """What was made by what and how fast, as JSON has it; the speed is that of this call alone."""
    config, request = run.config, made.request
    sampler = {
        "variant": config.variant,
        "levels": sorted(run.levels),
        "num_steps": config.num_steps,
        "step_size": config.step_size,
        "noise_start": config.noise_start,
        "noise_end": config.noise_end,
        "dtype": config.dtype,
        "engine": config.engine,
    }
    return {
        "run": str(run.path),
        "iteration": request.iteration,
        "weights": request.weights,
        "count": request.count,
        "resolution": request.size,
        "channels": request.channels,
        "seed": request.seed,
        "first_chain": request.first_chain,
        "sampler": sampler,
        "chunk": request.chunk,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "drawn": made.drawn,
        "seconds": made.seconds,
        "images_per_second": made.images_per_second,
    }


def _digest(run: CoarseToFineRun) -> str:
    """Of the weights of all levels, and how far the newest block has faded in."""
    digest = hashlib.sha256()
    for size, energy in sorted(run.levels.items()):
        beta = 1.0
        net: Any = energy
        if isinstance(net, functools.partial):
            net, beta = net.func, net.keywords["beta"]
        digest.update(f"{size} {beta!r}".encode())
        for name, tensor in net.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


@contextmanager
def _writing(output: Output, request: Request) -> Iterator[None]:
    """Turns errors of the file system and of chains into a RunError that says what is left."""
    try:
        yield
    except OSError as error:
        done = sum(len(request.rows(chunk)) for chunk in output.done() if chunk < request.chunks)
        raise RunError(
            f"{output.path} could not be written to: {error}. {done:,} of {request.count:,} samples are whole: once "
            "that is mended, the same command goes on from them"
        ) from error
    except FloatingPointError as error:
        raise RunError(f"no samples for {output.path}: {error}") from error


@contextmanager
def _bar(request: Request, missing: Sequence[int], shown: bool) -> Iterator[Callable[[int], None]]:
    from tqdm.auto import tqdm

    there = request.count - sum(len(request.rows(chunk)) for chunk in missing)
    with tqdm(total=request.count, initial=there, unit="image", desc="samples", disable=not shown) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _check_numbers(count: int, processes: int, chunk: int | None, output: Output) -> None:
    for name, value in {"count": count, "processes": processes, "chunk": chunk}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(output, GridFile) and count > LARGEST_GRID:
        raise ValueError(f"a grid shows at most {LARGEST_GRID:,} samples, got {count:,}: name a folder or an .npz")


def _check_folder(output: Output) -> None:
    parent = output.path.parent
    if not parent.is_dir():
        raise ValueError(f"the folder {parent} of {output.path} does not exist")


def _device_of(device: torch.device, number: int) -> torch.device:
    """Of process `number`: all GPUs in turn, unless one was named."""
    named = str(device) != "cuda"
    return device if named else torch.device("cuda", number % torch.cuda.device_count())
