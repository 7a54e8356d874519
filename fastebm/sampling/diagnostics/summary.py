"""`ChainSummary`: what chains told, as numbers, as a table and as a verdict in words."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastebm.sampling.diagnostics.accumulators import Moments, mean_of_chains
from fastebm.sampling.diagnostics.swaps import SwapSummary

GOOD_RHAT, BAD_RHAT, MANY_CHAINS = 1.01, 1.1, 16
GOOD_ESS = 400
FEW_UPDATES = 50
DRIFT, DRIFT_ERRORS, CHAINS_FOR_DRIFT = 0.1, 4.0, 8
LOW_ACCEPTANCE, HIGH_ACCEPTANCE, LOW_SWAPS = 0.2, 0.95, 0.05
WRONG_TEMPERATURE, TEMPERATURE_ERRORS = 0.1, 4.0
_UNSEEN = "No number from these chains shows a mode that none of them visited."


@dataclass(frozen=True, eq=False)
class ChainSummary:
    """The diagnostics of B chains after n updates. Tensors are float64 on the chains' device, S scalar summaries wide.

    Attributes:
        names: of the scalar summaries.
        num_chains, num_updates: B, and n, the number of updates that were observed.
        lags: L, the longest distance of autocovariances.
        mean, std: over all chains and updates, `(S,)`.
        rhat: R-hat of the halves of the chains, without ranks; 1 is best, at most 1.01 is wanted.
        drift, drift_error: how far the mean over the chains moved from their first to their second half, in standard
            deviations, and its standard error, NaN for one chain.
        ess: the effective sample size of all chains together, `(S,)`.
        ess_is_bound: where the autocorrelation was still positive at the end of the window of lags. There `ess` is from
            the means of 16 to 31 blocks of each chain, if that is smaller, and may still be too large. Not where the
            means of 64 or more whole chains, which leave out no correlation, gave a smaller one.
        nested_rhat: `(S,)`, where superchains were named.
        superchain_size: the number of chains in each of them.
        chain_mean, chain_variance, chain_ess: of each chain on its own, `(B, S)`; its ESS by the window of lags alone.
        finite: bool `(B,)`, which chains gave finite numbers alone.
        acceptance: `(B,)`, the share of proposals that were accepted.
        energy_error, gradient_norm, displacement: `(B,)` moments of each chain (`mean`, `variance`).
        divergences: int64 `(B,)`, how many energy errors were above 1000 or not a number.
        temperature: that of the samples, from gradients: Cov(x, dE/dx), which is T where p ~ exp(-E/T), as a mean over
            the elements. A clamp changes it, and an element that is held counts as 0.
        implied_temperature: what step size and noise imply, at the start and at the end.
        element_mean, element_variance: of each element over all chains and updates, in the shape of one state.
        swaps: counts of exchanges of a ladder.
        scalars: `(n, B, S)`, where they were kept.
    """

    names: tuple[str, ...]
    num_chains: int
    num_updates: int
    lags: int
    mean: Tensor
    std: Tensor
    rhat: Tensor
    drift: Tensor
    drift_error: Tensor
    ess: Tensor
    ess_is_bound: Tensor
    nested_rhat: Tensor | None
    superchain_size: int | None
    chain_mean: Tensor
    chain_variance: Tensor
    chain_ess: Tensor
    finite: Tensor
    acceptance: Tensor | None
    energy_error: Moments | None
    divergences: Tensor | None
    gradient_norm: Moments | None
    displacement: Moments | None
    temperature: float | None
    implied_temperature: tuple[float, float] | None
    element_mean: Tensor | None
    element_variance: Tensor | None
    swaps: SwapSummary | None
    scalars: Tensor | None

    @property
    def mcse(self) -> Tensor:
        """The standard error of `mean`, `(S,)`: `std / sqrt(ess)`."""
        return self.std / self.ess.sqrt()

    @property
    def annealed(self) -> bool:
        """Whether the implied temperature changes along the chain, by more than float32 schedules round."""
        start, end = self.implied_temperature or (0.0, 0.0)
        return not math.isclose(start, end, rel_tol=1e-5)

    def verdict(self) -> list[str]:
        """What is wrong with the chains, and what can't be judged from them, in plain sentences."""
        lost = int((~self.finite).sum())
        if lost:
            first = int((~self.finite).nonzero()[0])
            return [
                f"{lost} of {self.num_chains} chains are not finite; the first is in row {first}. Nothing else is "
                "judged: try a smaller step size, a clamp or a gradient clip."
            ]
        mixing = () if self.annealed else (*self._mixing(), *self._temperatures())
        wrong = [*self._moving(), *mixing, *self._proposals()]
        if not wrong and self.num_updates >= FEW_UPDATES:
            name, values = ("R-hat", self.rhat) if self.nested_rhat is None else ("nested R-hat", self.nested_rhat)
            wrong = [
                f"Nothing speaks against these chains: {name} is at most {_largest(values):.3f} and the effective "
                f"sample size at least {-_largest(-self.ess):.0f}."
            ]
        return wrong + self._unjudged()

    def __str__(self) -> str:
        """A table with a row for each scalar summary, and a line for what else is known."""
        columns: dict[str, list[str]] = {
            "": list(self.names),
            "mean": _numbers(self.mean),
            "std": _numbers(self.std),
            "error of mean": _numbers(self.mcse),
            "R-hat": [f"{value:.3f}" for value in self.rhat.tolist()],
        }
        if self.nested_rhat is not None:
            columns["nested R-hat"] = [f"{value:.3f}" for value in self.nested_rhat.tolist()]
        bounds = self.ess_is_bound.tolist()
        columns["ESS"] = [
            f"{'<' if bound else ''}{value:.0f}" for value, bound in zip(self.ess.tolist(), bounds, strict=True)
        ]
        widths = [max(map(len, (heading, *cells))) for heading, cells in columns.items()]
        rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([f"{self.num_chains:,} chains, {self.num_updates:,} updates", *lines, *self._other_lines()])

    def to_arviz(self) -> Any:
        """The scalar summaries of every update for ArviZ, as variables (chain, draw) of the group "posterior".

        A DataTree of arviz-base, or where only an ArviZ before 1.0 is installed its InferenceData.

        Raises ValueError where they were not kept (`Diagnostics(keep_scalars=True)`), and ModuleNotFoundError without
        ArviZ.
        """
        if self.scalars is None:
            raise ValueError("the scalar summaries of each update were not kept: Diagnostics(keep_scalars=True) does")
        posterior = {name: self.scalars[:, :, at].T.cpu().numpy() for at, name in enumerate(self.names)}
        module = _import_first("arviz_base", "arviz")
        if module is None:
            raise ModuleNotFoundError("to_arviz needs ArviZ: pip install arviz-base")
        return (
            module.from_dict({"posterior": posterior})
            if module.__name__ == "arviz_base"
            else module.from_dict(posterior)
        )

    # The sentences ----------------------------------------------------------------------------------------------------

    def _moving(self) -> Iterable[str]:
        if self.annealed and self.implied_temperature is not None:
            start, end = self.implied_temperature
            yield (
                f"Step size and noise imply a temperature that goes from {start:.3g} to {end:.3g} along the chain. "
                "R-hat and effective sample sizes suppose a stationary distribution, which there is not: they are not "
                "judged."
            )
        if still := self._where(self.std == 0, self.std, lambda _: ""):
            yield f"No chain ever changed {still}: the chains are stuck, or this says nothing about them."
        moved = (self.drift.abs() > DRIFT) & (self.drift.abs() > DRIFT_ERRORS * self.drift_error)
        if self.num_chains >= CHAINS_FOR_DRIFT and (moving := self._where(moved, self.drift, "{:+.2g}".format)):
            advice = (
                "as annealed chains do."
                if self.annealed
                else "the chains are still on their way. Leave out more updates at the start, or run longer."
            )
            yield (
                f"From the first to the second half of the chains there was a drift of {moving}, in standard "
                f"deviations{',' if self.annealed else ':'} {advice}"
            )

    def _mixing(self) -> Iterable[str]:
        good = math.sqrt(GOOD_RHAT**2 + 1 / (self.superchain_size or 1))  # 1 + 1/M: converged, with one draw a chain
        nested = torch.full_like(self.rhat, math.nan) if self.nested_rhat is None else self.nested_rhat
        judged = self.rhat.where(~(nested <= good), 1.0)
        if apart := self._where(judged > BAD_RHAT, self.rhat, "{:.3g}".format):
            yield (
                f"R-hat is above {BAD_RHAT} for {apart}: the chains disagree with one another, or with their own first "
                "halves. Run longer, or start them nearer to the target. Where chains have conditions or temperatures "
                "of their own, judge those of each alone."
            )
        elif short := self._where(judged > GOOD_RHAT, self.rhat, "{:.3g}".format):
            together = (
                " All of them together may suffice, if they forgot their starts: nested R-hat of superchains tells."
                if self.num_chains >= MANY_CHAINS and self.nested_rhat is None
                else ""
            )
            yield (
                f"R-hat is above {GOOD_RHAT} for {short}: each chain alone is too short to be like the others."
                f"{together}"
            )
        if apart := self._where(nested > good, nested, "{:.3g}".format):
            yield (
                f"Nested R-hat is above {good:.3f}, the bound for superchains of {self.superchain_size}, for {apart}: "
                "where chains end still depends on where they started. Run longer."
            )
        if few := self._where(self.ess < GOOD_ESS, self.ess, "{:.0f}".format):
            yield (
                f"All chains together are worth fewer than {GOOD_ESS} independent draws for {few}: their means are "
                "rough. Run longer, or more chains."
            )
        if bound := self._where(self.ess_is_bound, self.ess, lambda _: ""):
            place, remedy = "the window of lags", "Observe fewer updates (every=), or widen the window (lags=)."
            if self.lags >= self.num_updates - 1:
                place, remedy = "the chains", "Run longer."
            yield (
                f"The correlation of {bound} does not end within {place}: the effective sample sizes may be too large. "
                f"{remedy}"
            )

    def _proposals(self) -> Iterable[str]:
        if self.acceptance is not None:
            rate = float(mean_of_chains(self.acceptance))
            stuck = int((self.acceptance == 0).sum())
            if stuck:
                yield f"{stuck} of {self.num_chains} chains never accepted a proposal: they stand where they started."
            if rate < LOW_ACCEPTANCE:
                yield f"Only {rate:.1%} of the proposals were accepted: the steps are too large."
            elif rate > HIGH_ACCEPTANCE:
                yield f"{rate:.1%} of the proposals were accepted: larger steps would move faster."
        if self.divergences is not None and (diverged := int((self.divergences > 0).sum())):
            yield (
                f"{diverged} of {self.num_chains} chains had energy errors above 1000 or not a number: they diverge. "
                "Take smaller steps."
            )
        if self.swaps is not None:
            rates = self.swaps.acceptance.tolist()
            if cut := [f"{at} and {at + 1} ({rate:.1%})" for at, rate in enumerate(rates) if rate < LOW_SWAPS]:
                yield f"Hardly any exchange succeeds between the rungs {_listed(cut)}: put temperatures between them."

    def _temperatures(self) -> Iterable[str]:
        if self.temperature is None or self.implied_temperature is None or not self.implied_temperature[0]:
            return
        start = self.implied_temperature[0]
        apart = abs(self.temperature - start)
        error = start * math.sqrt(2 / -_largest(-self.ess))  # that of a variance, as if all elements moved as one
        if apart > WRONG_TEMPERATURE * start and apart > TEMPERATURE_ERRORS * error:
            yield (
                f"The samples have the temperature {self.temperature:.3g}, where step size and noise imply "
                f"{start:.3g}: the step is too large, the chains are not at rest yet, or a clamp, a clip, a mask or "
                "a wall holds them."
            )

    def _unjudged(self) -> list[str]:
        found = []
        if self.num_updates < 4:
            found.append(f"{self.num_updates} updates are too few for R-hat and effective sample sizes.")
        elif self.num_updates < FEW_UPDATES and not self.annealed:
            found.append(f"R-hat and effective sample sizes of {self.num_updates} updates are rough.")
        if self.num_chains == 1:
            found.append(
                "One chain can't tell whether others would end elsewhere: run at least four, from several starts."
            )
        if self.nested_rhat is not None and bool(self.nested_rhat.isnan().all()):
            found.append("Nested R-hat needs two superchains at least, so that it tells nothing here.")
        if "energy" not in self.names:
            found.append("The energy was not given, so that it was not judged.")
        return [*found, _UNSEEN]

    def _where(self, mask: Tensor, values: Tensor, shown: Callable[[float], str]) -> str:
        """The names where `mask` is true, with their values, as a list in words."""
        rows = zip(self.names, mask.tolist(), values.tolist(), strict=True)
        chosen = [(name, shown(value)) for name, here, value in rows if here]
        return _listed([f"{name} ({value})" if value else name for name, value in chosen])

    def _other_lines(self) -> Iterable[str]:
        if self.acceptance is not None:
            least, most = self.acceptance.aminmax()
            yield (
                f"acceptance {float(mean_of_chains(self.acceptance)):.1%}, of single chains {float(least):.1%} to "
                f"{float(most):.1%}"
            )
        for label, moments in (
            ("energy error", self.energy_error),
            ("gradient norm", self.gradient_norm),
            ("displacement", self.displacement),
        ):
            if moments is not None:
                least, most = moments.mean.aminmax()
                mean = float(mean_of_chains(moments.mean))
                yield f"{label} {mean:.4g}, of single chains {float(least):.4g} to {float(most):.4g}"
        if self.temperature is not None:
            yield f"temperature of the samples {self.temperature:.4g}"
        if self.implied_temperature is not None:
            start, end = self.implied_temperature
            yield f"temperature implied by step size and noise {start:.4g}" + (
                f" to {end:.4g}" if self.annealed else ""
            )
        if self.swaps is not None:
            yield "exchanges " + ", ".join(f"{rate:.1%}" for rate in self.swaps.acceptance.tolist())


def _import_first(*names: str) -> Any:
    """The first of these modules that is installed; None where none is."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # it is there, and lacks something itself
                raise
    return None


def _largest(values: Tensor) -> float:
    """The largest value that is a number; NaN where none is."""
    numbers = values[~values.isnan()]
    return float(numbers.max()) if len(numbers) else math.nan


def _numbers(values: Tensor) -> list[str]:
    return [f"{value:.4g}" for value in values.tolist()]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}" if words else ""
