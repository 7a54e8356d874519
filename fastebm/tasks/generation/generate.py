"""Writes any number of samples of a run to files, by several processes, and resumes after a kill.

Sample i is the end of chain `first + i`, whichever process draws it and when. So any number of processes draw chunks of
chains in any order, and a call that was killed resumes with the missing chunks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastebm import rng
from fastebm.data import to_pixels
from fastebm.distributed import OnFirst, ranks, shared_rows, together
from fastebm.progress import progress_bar
from fastebm.sampling.cascade import LevelSampler
from fastebm.scalars import as_device
from fastebm.tasks.arguments import check_memory, check_seed, check_whole
from fastebm.tasks.generation.files import IN_NUMBERS, GridFile, Output, PictureFolder, Pixels, Request, output_for
from fastebm.training import CoarseToFineRun, RunError

CHUNK_PIXELS = 256 * 32**2
QUEUED = 2
LARGEST_GRID = 10_000


@dataclass(frozen=True)
class GenerationResult:
    """The result of a call of `generate`.

    Attributes:
        path: the folder or file with the samples.
        request: everything that the samples depend on.
        drawn: number of samples that this call drew; the others existed before.
        seconds: time of this call from the start of its processes to the last file, without loading the run.
        numbers: path of the JSON file with these numbers.
    """

    path: Path
    request: Request
    drawn: int
    seconds: float
    numbers: Path

    @property
    def images_per_second(self) -> float | None:
        """Samples that this call drew per second; None if it drew none."""
        return self.drawn / self.seconds if self.drawn else None


def generate(
    run: CoarseToFineRun | str | Path,
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
    """Writes `count` samples of a coarse-to-fine run to `out`, as bytes: round((x + 1) * 127.5).

    The samples are those of `CoarseToFineRun.sample`. A call that was killed or failed resumes when it is repeated: it
    uses the checkpoint that it began with and ends with the same files. Where all is there already, nothing is drawn or
    written. With the fused engine, files have the same bits for any number of processes and threads. At the end it
    writes the request, the sampler's settings, seconds and images per second as JSON: to `numbers.json` in a folder, or
    beside a file, whose whole name it extends by .json.

    Args:
        run: folder of the run, finished or not; or the run itself, whose folder and iteration are then used.
        out: a folder for 000000.png, 000001.png and so on; a .npz for an array "images", uint8 (N, S, S, C); a .png for
            a grid of all, at most 10,000.
        seed: of the samples; by default they continue the noise of the run's training.
        processes: number of processes, at most 16, or four for each CPU core. Each draws its share of the chunks with
            its share of the CPU threads; several GPUs are used in turn. With more than one, a script needs the usual
            `if __name__ == "__main__":`.
        chunk: chains that run at a time; by default 256 at up to 32x32, and as many pixels above. A kill loses at most
            three chunks of each process: the one being drawn, and two that wait to be written.
        device: cpu or cuda; by default a GPU if there is one.
        overwrite: starts again if another request was begun there, and replaces a finished output.
        progress: shows a bar.

    Raises:
        ValueError: for numbers out of range, an unsuitable path, files that may not be overwritten, or more samples
            than the disk or the memory can hold.
        TypeError: for what is no coarse-to-fine run, and numbers that are not whole.
        RunError: where there is no run, its checkpoint was deleted meanwhile, chains are not finite, a process dies,
            another one writes to `out`, or files can't be written. Finished chunks are kept.
    """
    if not isinstance(run, CoarseToFineRun | str | Path):
        raise TypeError(f"generate needs a coarse-to-fine run or its folder, got {type(run).__name__}")
    output = output_for(Path(out))
    _check_numbers(count, processes, chunk, output)
    if seed is not None:
        check_seed(seed)
    output.check_writable()
    device = as_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    # Before anything is written: a mistake must not leave a folder behind.
    run = _load_run(run, output, device, overwrite)
    request = _request(run, count, seed, chunk)
    if isinstance(output, PictureFolder | GridFile) and request.channels not in (1, 3):
        raise ValueError(f"a PNG has 1 or 3 channels, the run's images have {request.channels}: write an .npz")
    output.check(request, overwrite)
    if output.complete(request) and not overwrite:
        return GenerationResult(output.path, request, 0, 0.0, output.numbers)
    _check_size(request, output, device)
    with _writing(output, request), output.begun(request, overwrite):
        start = time.perf_counter()
        finished = {chunk for chunk in output.finished_chunks() if chunk < request.chunks}
        drawn = count - request.samples_of(finished)
        processes = max(1, min(processes, request.chunks - len(finished)))
        with progress_bar(count, "samples", "image", shown=progress, initial=count - drawn) as bar:
            if processes == 1:
                missing = list(request.missing(finished))
                together(_draw_chunks, run, request, missing, OnFirst((output, bar.update)))
            else:
                _draw_in_processes(run.path, request, output, finished, processes, device, bar.update)
        output.finish(request)
        made = GenerationResult(output.path, request, drawn, time.perf_counter() - start, output.numbers)
        output.close(_numbers(made, run, max(processes, ranks().size), device))
    return made


def _draw_chunks(
    run: CoarseToFineRun, request: Request, chunks: Iterable[int], to: OnFirst[tuple[Output, Callable[[int], Any]]]
) -> None:
    """Draws chunks, as many at a time as there are ranks, and writes them to an output, telling a function how many.

    A thread writes while the next are drawn; at most QUEUED wait to be written.
    """
    cascade = run.cascade()  # one for all chunks: its gradients are captured once
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "write samples") as writer:
        for group in _neighbours(chunks, ranks().size):
            first, last = request.rows(group[0]).start, request.rows(group[-1]).stop
            drawn = shared_rows(last - first, functools.partial(_draw, cascade, request, first))
            if to.value is None:
                continue
            pixels = drawn.cpu().numpy()
            for chunk in group:
                rows = request.rows(chunk)
                if len(writing) == QUEUED:
                    writing.popleft().result()
                part = pixels[rows.start - first : rows.stop - first]
                writing.append(writer.submit(_write, to.value[0], request, chunk, part, to.value[1]))
            _stop_without_parent()
        for written in writing:
            written.result()


def _draw(cascade: LevelSampler, request: Request, first: int, rows: range) -> Tensor:
    """Bytes (len(rows), S, S, C) of the samples whose numbers are those of the rows plus `first`."""
    chain = request.first_chain + first + rows.start
    samples = cascade.sample(len(rows), request.seed, chain, channels=request.channels, batch_size=request.chunk)
    return to_pixels(samples).permute(0, 2, 3, 1).contiguous()


def _neighbours(chunks: Iterable[int], most: int) -> Iterator[list[int]]:
    """The chunks in groups of at most so many that follow each other."""
    group: list[int] = []
    for chunk in chunks:
        if group and (len(group) == most or chunk != group[-1] + 1):
            yield group
            group = []
        group.append(chunk)
    if group:
        yield group


def _write(output: Output, request: Request, chunk: int, pixels: Pixels, advance: Callable[[int], Any]) -> None:
    output.write(request, chunk, pixels)
    advance(len(pixels))


def _draw_in_processes(
    run_dir: Path,
    request: Request,
    output: Output,
    finished: Collection[int],
    processes: int,
    device: torch.device,
    advance: Callable[[int], Any],
) -> None:
    """Draws the missing chunks in several processes; process i of n draws every n-th of them from the i-th on."""
    context = multiprocessing.get_context("spawn")  # forked processes can use neither a GPU nor OpenMP threads
    threads = max(1, torch.get_num_threads() // processes)
    resource_tracker.ensure_running()  # the first process would start it, and unblock signals in passing
    workers = []
    try:
        for number in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            share = (finished, number, processes)
            arguments = (run_dir, request, output, share, _worker_device(device, number), threads, sender)
            process = context.Process(target=_work, args=arguments, daemon=True)
            # Ctrl-C reaches all processes; the parent ends the others, which inherit this mask and must not die of it
            # while they import.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sender.close()  # closes this process's copy, so that the pipe ends with the worker
            workers.append((process, receiver))
        _follow([receiver for _, receiver in workers], advance)
    finally:
        for process, _ in workers:
            process.terminate()
            process.join()


def _follow(receivers: list[Connection], advance: Callable[[int], Any]) -> None:
    """Reports the number of written samples to `advance` until all processes have ended.

    Raises the exception of a process that failed, and RunError if one ends without a message.
    """
    while receivers:
        for receiver in wait(receivers):
            assert isinstance(receiver, Connection)
            try:
                message = receiver.recv()
            except EOFError:
                raise RunError(
                    "a process that draws samples was killed; the system may lack memory for so many"
                ) from None
            if isinstance(message, Exception):
                raise message
            if message is None:
                receivers.remove(receiver)
            else:
                advance(message)


def _work(
    run_dir: Path,
    request: Request,
    output: Output,
    share: tuple[Collection[int], int, int],
    device: torch.device,
    threads: int,
    sender: Connection,
) -> None:
    """Draws a share of the chunks in a process: of those that are not finished, every n-th from the i-th on.

    Sends the number of samples after each chunk, and None or an exception at the end.
    """
    torch.set_num_threads(threads)
    try:
        run = CoarseToFineRun.load(run_dir, device, iteration=request.iteration)
        finished, first, processes = share
        chunks = itertools.islice(request.missing(finished), first, None, processes)
        _draw_chunks(run, request, chunks, OnFirst((output, sender.send)))
        sender.send(None)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            sender.send(error)


def _stop_without_parent() -> None:
    """Ends a process whose parent was killed, because another call may resume the same chunks."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit(1)


def _load_run(
    run: CoarseToFineRun | str | Path, output: Output, device: torch.device, overwrite: bool
) -> CoarseToFineRun:
    """The run at the iteration that the output was begun with; otherwise at the run's own or the newest one."""
    path, iteration = (run.path, run.iteration) if isinstance(run, CoarseToFineRun) else (run, None)
    if not overwrite and (stored := output.stored_request()) is not None:
        iteration = stored.get("iteration")
    try:
        return CoarseToFineRun.load(path, device, iteration=iteration)
    except RunError as error:
        if iteration is None:
            raise
        raise RunError(f"{output.path} can't be resumed: {error}. --overwrite begins anew") from error


def _request(run: CoarseToFineRun, count: int, seed: int | None, chunk: int | None) -> Request:
    config, size = run.config, run.size
    request = Request(
        iteration=run.iteration,
        weights=_digest(run),
        sampler={
            "variant": config.variant,
            "levels": sorted(run.levels),
            "num_steps": config.num_steps,
            "step_size": config.step_size,
            **({} if config.step_growth == 1 else {"step_growth": config.step_growth}),
            "noise_start": config.noise_start,
            "noise_end": config.noise_end,
            "dtype": config.dtype,
            "engine": config.engine,
        },
        seed=config.seed if seed is None else seed,
        first_chain=config.total_chains if seed is None else 0,
        count=count,
        chunk=chunk or max(1, CHUNK_PIXELS // max(32, size) ** 2),
        channels=config.channels,
        size=size,
    )
    rng.make_chain_ids(request.first_chain, count)
    return request


def _numbers(made: GenerationResult, run: CoarseToFineRun, processes: int, device: torch.device) -> dict[str, Any]:
    """The request, the sampler and the speed of this call, as JSON."""
    request = {IN_NUMBERS.get(name, name): value for name, value in dataclasses.asdict(made.request).items()}
    return {
        "run": str(run.path),
        **request,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "drawn": made.drawn,
        "seconds": made.seconds,
        "images_per_second": made.images_per_second,
    }


def _digest(run: CoarseToFineRun) -> str:
    """SHA-256 of the weights of all levels, and of the fade-in of the newest block."""
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
    """Turns errors of the file system and of chains into a RunError that says how many samples are complete."""
    try:
        yield
    except OSError as error:
        done = request.samples_of(output.finished_chunks())
        raise RunError(
            f"{output.path} could not be written to: {error}. {done:,} of {request.count:,} samples are whole: once "
            "that is mended, the same command goes on from them"
        ) from error
    except FloatingPointError as error:
        raise RunError(f"no samples for {output.path}: {error}") from error


def _check_numbers(count: int, processes: int, chunk: int | None, output: Output) -> None:
    check_whole("count", count)
    check_whole("processes", processes, most=max(16, 4 * (os.cpu_count() or 1)))
    if processes > 1 and ranks().size > 1:
        raise ValueError(f"processes is {processes}, and torchrun started {ranks().size} already: leave processes out")
    if chunk is not None:
        check_whole("chunk", chunk)
    if isinstance(output, GridFile) and count > LARGEST_GRID:
        raise ValueError(f"a grid shows at most {LARGEST_GRID:,} samples, got {count:,}: name a folder or an .npz")


def _check_size(request: Request, output: Output, device: torch.device) -> None:
    """Raises ValueError where the samples don't fit on the disk, or a chunk not into memory."""
    output.check_space(request)
    at_once = min(request.chunk, request.count)
    check_memory(f"a chunk of {at_once:,} samples", at_once * request.channels * request.size**2, device)
    if isinstance(output, GridFile):
        numbers = request.count * request.channels * request.size**2
        check_memory(f"a grid of {request.count:,} samples", numbers, torch.device("cpu"))


def _worker_device(device: torch.device, number: int) -> torch.device:
    """The device of process `number`: all GPUs in turn, unless one was named."""
    named = str(device) != "cuda"
    return device if named else torch.device("cuda", number % torch.cuda.device_count())
