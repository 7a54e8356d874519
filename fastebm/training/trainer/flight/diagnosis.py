"""What the numbers of a flight record show, in plain sentences: why energies explode, as far as it can be told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastebm.training.trainer.flight.record import FlightRecord, mean

RECENT = 20
"""The last updates, which are compared with those before them."""
FEWEST = 8
"""Updates below which only numbers that are not finite, and weights that grow, are diagnosed."""
STEEP_SHARE = 0.25
"""Of chains with a step size times curvature above 2."""
RISING, RARELY = 0.2, 0.05
"""Share of steps that raise the energy where chains swing across a valley, and where they don't."""
STUCK, MORE_STUCK = 0.5, 0.25
"""Share of samples' pixels at the clamp, and how much larger than that of the images it must be."""
ONE_SIDED = 0.9
"""Share of recent updates whose gap has one sign."""
GROWTH = 2.0
"""How many times as far from 0 the recent gap must be as that before."""
LEAST_GAP, FAR_BEYOND = 1.0, 3.0
"""Energies by which samples must lie below images, as they do so a little in any run; and how many times the largest
gap before one is that opens within an update."""
ABOVE_SPREADS = 0.05
"""By how many spreads of a batch of images samples must lie above images."""
FLAT = 1e-3
"""Spread of the energies of a batch of images, and norm of gradients along chains, of an energy that says nothing."""
WEIGHT_GROWTH = 0.01
"""Relative growth of the norm of the weights in one update."""
DRIFT_SPREADS, LEAST_DRIFT, DRIFT_GAPS = 2.0, 1.0, 4.0
"""By how many spreads of a batch, units, and gaps the mean energies must have moved together."""
JUMP, SUDDEN = 5.0, 3
"""How many times the largest energies before the last updates, and how many these are."""
FEW, FAR = 0.2, 10.0
"""Largest share of chains that count as few, and their distance from the median of all in interquartile ranges."""

UNKNOWN = "The cause is not recognised: none of the known ones shows in these numbers."


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers show.

    Attributes:
        cause: its name: "not finite", "coarse", "stuck", "rising gap", "falling gap", "weights grow", "drift",
            "flat", "jump" or "few chains".
        sentence: what it is, with the numbers and what may help.
        numbers: the numbers.
    """

    cause: str
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)


def diagnose(record: FlightRecord) -> list[Finding]:
    """All that the numbers of a record show, what explains most first; nothing where they show none of it."""
    found = [_not_finite(record)]
    if len(record) < FEWEST:
        found.append(_weights_grow(record))
    else:
        checks = (_coarse, _stuck, _rising_gap, _falling_gap, _weights_grow, _drift, _flat, _jump, _few_chains)
        found += [check(record) for check in checks]
    return [finding for finding in found if finding is not None]


def sentence(findings: Iterable[Finding], updates: int = FEWEST) -> str:
    """The diagnosis in words, of a record of so many updates."""
    if said := " ".join(finding.sentence for finding in findings):
        return said
    if updates < FEWEST:
        return f"Only {updates} updates are recorded: too few for a diagnosis."
    return UNKNOWN


def _not_finite(record: FlightRecord) -> Finding | None:
    for number, iteration in enumerate(record.iterations.tolist()):
        where = next(_infinite(record, number), None)  # in the order in which an update computes them
        if where is not None:
            text = f"The first number that is not finite is {where} in update {iteration:,}."
            return Finding("not finite", text, {"iteration": float(iteration)})
    return None


def _infinite(record: FlightRecord, number: int) -> Iterator[str]:
    for kind, chains in record.chains.items():
        steps = np.isinf(chains.energies[number]).any(1).nonzero()[0]
        if len(steps):
            yield f"an energy before step {steps[0] + 1} of chains from {kind}"
    for name, energies in (("images", record.data), ("chain ends", record.samples)):
        if np.isinf(energies[number]).any():
            yield f"an energy of {name}"
    for name, values in record.numbers.items():
        if np.isinf(values[number]):
            yield name


def _coarse(record: FlightRecord) -> Finding | None:
    """An explosion may take an update or two: the last ones count beside the median of more."""
    shares = {
        kind: float(np.fmax(_median(chains.steep[-RECENT:]), _largest(chains.steep[-SUDDEN:])))
        for kind, chains in record.chains.items()
    }
    kind = max(shares, key=lambda kind: np.nan_to_num(shares[kind]), default="")
    if not kind or not shares[kind] >= STEEP_SHARE:
        return _swinging(record)
    chains = record.chains[kind]
    last = RECENT
    if shares[kind] > np.nan_to_num(_median(chains.steep[-RECENT:])):
        last = SUDDEN - int(np.nanargmax(chains.steep[-SUDDEN:]))
    product, before = (_median(chains.largest_curvatures[rows]) for rows in (slice(-last, None), slice(-last)))
    rising = _median(chains.rising[-last:])
    earlier = f", {before:.2g} before" if np.isfinite(before) else ""
    text = (
        f"Chains from {kind} are too coarse for so steep an energy: step size times curvature is above 2, where a step "
        f"overshoots, in {shares[kind]:.0%} of them (median {product:.2g}{earlier}), and {rising:.0%} of their steps "
        f"raise the energy. {_finer(kind)}"
    )
    return Finding("coarse", text, {"share": shares[kind], "median": product, "before": before, "rising": rising})


def _finer(kind: str) -> str:
    """What may help such chains. With a data term, its temperature says how steep an energy they learn."""
    temperature = " a smaller start_temperature," if kind == "noisy images" else ""
    return f"More data_noise,{temperature} or a smaller step_size with more steps, may hold them."


def _swinging(record: FlightRecord) -> Finding | None:
    """Chains that overshoot since the last updates, none of which may have been read in detail."""
    for kind, chains in record.chains.items():
        now, before = _largest(chains.rising[-SUDDEN:]), _median(chains.rising[:-SUDDEN])
        if now >= RISING and before <= RARELY:
            text = (
                f"Chains from {kind} began to overshoot: {now:.0%} of their steps raise the energy, {before:.0%} did "
                f"before. They are too coarse for so steep an energy. {_finer(kind)}"
            )
            return Finding("coarse", text, {"rising": now, "rising_before": before})
    return None


def _stuck(record: FlightRecord) -> Finding | None:
    samples, images = (_median(_number(record, name)[-RECENT:]) for name in ("clamped", "clamped_data"))
    if not samples >= max(STUCK, np.nan_to_num(images) + MORE_STUCK):
        return None
    text = (
        f"Samples are stuck at the clamp: {samples:.0%} of their pixels lie at or beyond ±1, and of images "
        f"{np.nan_to_num(images):.0%}. Chains are driven to the edge of the range, where their gradient does not bring "
        "them back."
    )
    return Finding("stuck", text, {"samples": samples, "images": images})


def _rising_gap(record: FlightRecord) -> Finding | None:
    gap = _number(record, "gap")
    latest, recent, before = _recent_and_before(gap)
    most = _largest(np.abs(gap[:-1]))
    least = max(FLAT, ABOVE_SPREADS * np.nan_to_num(_spread(record.data[-len(latest) :])))
    one_sided = recent > least and _share(latest > 0, latest) >= ONE_SIDED
    if gap[-1] > max(LEAST_GAP, FAR_BEYOND * np.nan_to_num(most)):
        recent, before = float(gap[-1]), most
    elif not (one_sided and recent > GROWTH * np.nan_to_num(before)):
        return None
    earlier = f", after ±{before:.2g} before" if np.isfinite(before) else ""
    text = (
        f"Samples have higher energies than images (gap {recent:+.2g}{earlier}), and contrastive divergence then "
        "drives the two further apart. A gap_brake or gap_hinge, or a stricter one, may hold them."
    )
    return Finding("rising gap", text, {"gap": recent, "before": before})


def _falling_gap(record: FlightRecord) -> Finding | None:
    gap = _number(record, "gap")
    most = _largest(np.abs(gap[:-1]))
    if -gap[-1] > max(LEAST_GAP, FAR_BEYOND * np.nan_to_num(most)):
        text = (
            f"In one update chains came to energies far below those of images (gap {gap[-1]:+.3g}, at most "
            f"±{most:.2g} before): the update before opened a slope that they ran down. A smaller learning rate or a "
            "larger energy_l2 may keep it from that."
        )
        return Finding("falling gap", text, {"gap": float(gap[-1]), "before": most})
    latest, recent, before = _recent_and_before(gap)
    if not -recent > LEAST_GAP or not _share(latest < 0, latest) >= ONE_SIDED:
        return None
    if not -recent > GROWTH * np.nan_to_num(before):
        return None
    earlier = f", after ±{before:.2g} before" if np.isfinite(before) else ""
    text = (
        f"Chains reach energies far below those of images (gap {recent:+.2g}{earlier}): wells that updates do not fill "
        "as fast as they deepen. A larger energy_l2 or a smaller learning rate may."
    )
    return Finding("falling gap", text, {"gap": recent, "before": before})


def _weights_grow(record: FlightRecord) -> Finding | None:
    norms = record.weight_norm[-RECENT:]
    there = np.isfinite(norms).nonzero()[0]
    if len(there) < 2:
        return None
    first, last = norms[there[0]], norms[there[-1]]
    updates = int(record.iterations[-RECENT:][there[-1]] - record.iterations[-RECENT:][there[0]])
    growth = float((last / first) ** (1 / updates) - 1) if first > 0 and updates > 0 else 0.0
    if not growth > WEIGHT_GROWTH:
        return None
    rate = _number(record, "learning_rate")[-1]
    text = (
        f"The weights grow by {growth:.1%} in an update (norm {first:.3g} to {last:.3g} in {updates}): the learning "
        f"rate{f' {rate:.2g}' if np.isfinite(rate) else ''} is too large."
    )
    return Finding("weights grow", text, {"growth": growth, "first": float(first), "last": float(last)})


def _drift(record: FlightRecord) -> Finding | None:
    length = min(RECENT, len(record) // 2)
    moves = []
    for energies in (record.data, record.samples):
        means = mean(_finite(energies))
        moves.append((_median(means[:length]), _median(means[-length:])))
    (data, data_now), (samples, samples_now) = moves
    move, other = data_now - data, samples_now - samples
    spread, gap = _spread(record.data[-length:]), abs(samples_now - data_now)
    least = max(LEAST_DRIFT, DRIFT_SPREADS * np.nan_to_num(spread), DRIFT_GAPS * gap)
    if not (move * other > 0 and min(abs(move), abs(other)) > least):
        return None
    text = (
        f"The energies of images and samples drift together, from {data:.3g} to {data_now:.3g} in {len(record)} "
        "updates, with a small gap: nothing holds their level. A larger energy_l2 does."
    )
    return Finding("drift", text, {"first": data, "last": data_now, "gap": gap})


def _flat(record: FlightRecord) -> Finding | None:
    spread = _spread(record.data[-RECENT:])
    norms = {kind: _median(chains.gradient_norms[-RECENT:]) for kind, chains in record.chains.items()}
    steepest = max((norm for norm in norms.values() if not np.isnan(norm)), default=np.nan)
    if not (spread < FLAT and steepest < FLAT):
        return None
    text = (
        f"The energy is flat: energies of images differ by {spread:.1g}, and its gradient along chains has the norm "
        f"{steepest:.1g}. It has collapsed, and moves chains no more; a smaller learning rate may keep another run "
        "from that."
    )
    return Finding("flat", text, {"spread": spread, "gradient_norm": float(steepest)})


def _jump(record: FlightRecord) -> Finding | None:
    largest = np.fmax(*(_number(record, f"largest_energy_{name}") for name in ("data", "samples")))
    before, after = (values[~np.isnan(values)] for values in (largest[:-SUDDEN], largest[-SUDDEN:]))
    if not len(before) or not len(after) or not after.max() > JUMP * before.max():
        return None
    weights = record.weight_norm[-SUDDEN - 1 :]
    moved = f", while the norm of the weights went from {weights[0]:.3g} to {weights[-1]:.3g}" if len(weights) else ""
    text = (
        f"Energies jumped within {SUDDEN} updates, from magnitudes of at most {before.max():.3g} to {after.max():.3g}"
        f"{moved if np.isfinite(weights).all() else ''}: single updates are too large for such an energy."
    )
    return Finding("jump", text, {"before": float(before.max()), "after": float(after.max())})


def _few_chains(record: FlightRecord) -> Finding | None:
    ends = _finite(record.samples[-1])
    ends = ends[~np.isnan(ends)]
    if not len(ends):
        return None
    low, middle, high = np.quantile(ends, (0.25, 0.5, 0.75))
    far = np.abs(ends - middle) > FAR * max(high - low, 1e-6)
    if not 0 < far.mean() <= FEW:
        return None
    worst = float(ends[far][np.abs(ends[far] - middle).argmax()])
    text = (
        f"Of {len(ends)} chains {int(far.sum())} end far from the others, at an energy of up to {worst:.3g} where the "
        f"median is {middle:.3g}: few chains decide the update. A trim may leave them out."
    )
    return Finding("few chains", text, {"share": float(far.mean()), "worst": worst, "median": float(middle)})


# Numbers --------------------------------------------------------------------------------------------------------------


def _number(record: FlightRecord, name: str) -> NDArray[Any]:
    """A number of each update, NaN where there is none or it is not finite."""
    return _finite(record.numbers.get(name, np.full(len(record), np.nan)))


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(values), values, np.nan)


def _recent_and_before(values: NDArray[Any]) -> tuple[NDArray[Any], float, float]:
    """The recent values, their median, and that of the magnitudes before them; of a short record half is recent."""
    count = max(1, min(RECENT, len(values) // 2))
    return values[-count:], _median(values[-count:]), _median(np.abs(values[:-count]))


def _median(values: NDArray[Any]) -> float:
    """The median of what is a number, an infinite one too; NaN where nothing is."""
    there = values[~np.isnan(values)]
    return float(np.median(there)) if len(there) else float("nan")


def _largest(values: NDArray[Any]) -> float:
    """The largest of what is a number; NaN where nothing is."""
    return float(np.fmax.reduce(values, initial=np.nan))


def _share(chosen: NDArray[Any], values: NDArray[Any]) -> float:
    """The share of what is a number that was chosen."""
    there = ~np.isnan(values)
    return float(chosen[there].mean()) if there.any() else 0.0


def _spread(energies: NDArray[Any]) -> float:
    """The median over updates of the standard deviation in a batch."""
    deviations = [float(row[np.isfinite(row)].std()) for row in energies if np.isfinite(row).any()]
    return float(np.median(deviations)) if deviations else float("nan")
