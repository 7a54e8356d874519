"""Pictures of a run that every method draws: samples beside real images, and curves of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastebm import plotting
from fastebm.runs.folder import RunFolder
from fastebm.runs.run import Run
from fastebm.training.tensorboard import TensorBoardWriter


def save_run_pictures(
    run: Run,
    samples: Tensor,
    real: Tensor,
    folder: RunFolder,
    board: TensorBoardWriter,
    curves: plotting.Curves = plotting.ENERGY_CURVES,
    panels: Mapping[str, Sequence[tuple[str, Tensor]]] | None = None,
) -> None:
    """Writes samples.png, curves.png and a file of titled grids for each of `panels`.

    With `pictures_every` it also writes a grid of samples named after the iteration to the folder pictures/.
    """
    with folder.writing("pictures"):
        plotting.save_samples(folder.path / "samples.png", samples, real)
        for name, grids in (panels or {}).items():
            plotting.save_panels(folder.path / f"{name}.png", grids)
        plotting.save_curves(folder.path / "curves.png", folder.log.lines(), curves)
        if run.config.pictures_every:
            (folder.path / "pictures").mkdir(exist_ok=True)
            plotting.save_grid(folder.path / "pictures" / f"iteration-{run.iteration:09d}.png", samples)
        board.add_image(f"samples/{run.size}", plotting.tile(samples, plotting.GRID), run.iteration)
