"""Which charts a report has, of which metrics, and what is said below each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training.utils.charts import BINS, CLIPPED_FROM, COLOURS, Bars, Curve, draw_curves, draw_histogram
from training.utils.heldout_rows import HeldoutRows
from training.utils.losses import TIE
from training.utils.run_record import RunRecord, Series
from training.utils.verdict import MARGINS, main_loss

SOURCE_PREFIX = "eval/source/"


@dataclass(frozen=True)
class Key:
    """What a line of a chart is."""

    label: str
    colour: int
    dashed: bool


@dataclass(frozen=True)
class Figure:
    """One chart as it stands in the page."""

    title: str
    svg: str
    told: str
    """What it shows, for whoever cannot see it."""
    caption: str
    keys: Sequence[Key]


@dataclass(frozen=True)
class Plan:
    """Metrics that are drawn together, by their names without `train/` and `eval/`."""

    title: str
    names: tuple[str, ...]
    note: str = ""
    level: float | None = None


def figures(runs: Mapping[str, RunRecord]) -> Iterator[Figure]:
    """All charts of one run, or of several over each other, by the names they go by.

    What the colours of several runs mean stands above all charts, not beside each.
    """
    for plan in _plans(runs):
        curves = list(_curves(plan, runs))
        if curves:
            figure = _figure(plan, curves)
            yield figure if len(runs) == 1 else replace(figure, keys=())
    if len(runs) == 1:
        yield from _by_source(*runs.values())
    if any(run.heldout for run in runs.values()):
        yield _distribution(runs)


def _plans(runs: Mapping[str, RunRecord]) -> Iterator[Plan]:
    logged = (name for run in runs.values() for name in run.metrics.series)
    names = dict.fromkeys(name.removeprefix("train/").removeprefix("eval/") for name in logged)
    loss = main_loss(names)
    plans = [
        *([Plan(f"Loss ({loss})", (loss,))] if loss else []),
        Plan("Perplexity", ("perplexity",)),
        *(
            Plan(title.capitalize(), (name,), "Above 0, chosen is preferred.", 0)
            for name, title in MARGINS.items()
        ),
        Plan(
            "Accuracy", ("accuracy",), "Share of rows whose chosen answer is preferred; a coin has 0.5.", 0.5
        ),
        Plan(
            "Change of log-probability against the reference (nats)",
            ("delta_logp/chosen", "delta_logp/rejected"),
            "Chosen below 0: likelihood displacement.",
            0,
        ),
        Plan(
            "Change of log-probability since the start, held out (nats)",
            ("since_start/chosen", "since_start/rejected"),
            "Chosen below 0: likelihood displacement.",
            0,
        ),
        Plan("Mean log-probability of a token (nats)", ("chosen_avg_lp", "rejected_avg_lp")),
        *(Plan(f"Loss ({n})", (n,)) for n in names if n.endswith("_loss") and n != loss),
        Plan(
            "Own preference",
            ("policy_preference",),
            "Share of rows whose chosen answer the model itself finds likelier per token.",
            0.5,
        ),
        Plan("Gradient norm", ("grad_norm",)),
        Plan("Learning rate", ("lr",)),
        Plan("Tokens per second", ("tokens_per_sec",)),
    ]
    for plan in plans:
        if len(runs) == 1:
            yield plan
        else:  # colours tell runs apart
            yield from (Plan(_title(plan, name), (name,), plan.note, plan.level) for name in plan.names)


def _title(plan: Plan, name: str) -> str:
    return plan.title if len(plan.names) == 1 else f"{plan.title}: {name.rpartition('/')[2]}"


def _curves(plan: Plan, runs: Mapping[str, RunRecord]) -> Iterator[Curve]:
    for number, (run_name, run) in enumerate(runs.items()):
        for place, name in enumerate(plan.names):
            for heldout, series in _series_of(run, name):
                kind = "held out" if heldout else "training"
                label = kind if len(runs) == 1 else f"{run_name}, {kind}"
                if len(plan.names) > 1:
                    label = f"{name.rpartition('/')[2].removesuffix('_avg_lp')}, {kind}"
                alone = len(runs) == 1 and len(plan.names) == 1
                colour = int(heldout) if alone else number + place
                yield Curve(label, series.steps, series.values, colour, dashed=heldout)


def _series_of(run: RunRecord, name: str) -> Iterator[tuple[bool, Series]]:
    """In training, and held out, where there is a number."""
    of_run = run.metrics.series
    training = of_run.get(f"train/{name}") or of_run.get(name)
    for heldout, series in ((False, training), (True, of_run.get(f"eval/{name}"))):
        if series is not None and np.isfinite(series.values).any():
            yield heldout, series


def _figure(plan: Plan, curves: Sequence[Curve]) -> Figure:
    name = f"c-{plan.names[0].replace('/', '-')}"
    missing = sum(int((~np.isfinite(curve.values)).sum()) for curve in curves)
    longest = max(len(curve.steps) for curve in curves)
    binned = (
        f"Line: mean of {longest // BINS:,} steps; shade: their range."
        if any(c.is_binned for c in curves)
        else ""
    )
    gaps = f"{missing:,} steps have no finite number." if missing else ""
    told = "; ".join(_told(curve) for curve in curves)
    return Figure(
        plan.title,
        draw_curves(name, curves, plan.level),
        f"{plan.title} by step. {told}.",
        " ".join(filter(None, (plan.note, binned, gaps))),
        [Key(curve.label, curve.colour % COLOURS, curve.dashed) for curve in curves],
    )


def _told(curve: Curve) -> str:
    kept = curve.finite
    first, last = (f"{number(float(kept.values[i]))} at step {int(kept.steps[i]):,}" for i in (0, -1))
    extremes = f"lowest {number(float(kept.values.min()))}, highest {number(float(kept.values.max()))}"
    return f"{curve.label}: {first}" + (f", {last}, {extremes}" if len(kept.steps) > 1 else "")


def _by_source(run: RunRecord) -> Iterator[Figure]:
    for measure, title, level in (("accuracy", "accuracy", 0.5), ("sft_loss", "loss", None)):
        found = {
            name.removeprefix(SOURCE_PREFIX).removesuffix(f"/{measure}"): series
            for name, series in run.metrics.series.items()
            if name.startswith(SOURCE_PREFIX) and name.endswith(f"/{measure}")
        }
        if found:
            yield _of_sources(f"Held-out {title} by source", found, level)


def _of_sources(title: str, found: Mapping[str, Series], level: float | None) -> Figure:
    shown = list(found.items())[:COLOURS]
    curves = [
        Curve(name, series.steps, series.values, place, True) for place, (name, series) in enumerate(shown)
    ]
    left_out = (
        f"The first {COLOURS} of {len(found)} sources; the table has all." if len(found) > COLOURS else ""
    )
    return _figure(Plan(title, ("source",), left_out, level), curves)


def _distribution(runs: Mapping[str, RunRecord]) -> Figure:
    """Of the held-out values: before and after of one run, or after of each of several."""
    notes, bars = [], []
    for place, (name, run) in enumerate(runs.items()):
        if run.heldout is None:
            continue
        after = _values(run.heldout.after)
        if len(runs) > 1:
            bars.append(Bars(name, after, place))
            continue
        before = _values(run.heldout.before)
        if len(before) and np.abs(before).max() <= TIE:
            notes.append("Before training all are 0: the policy is its reference.")
        elif len(before):
            bars.append(Bars("before", before, 1))
        bars.append(Bars(f"after step {run.heldout.step:,}", after, 0))
        if lost := len(run.heldout.after.rows) - len(after):
            notes.append(f"{lost:,} values are not finite.")
    bars = [part for part in bars if len(part.values)]
    heldout = next(run.heldout for run in runs.values() if run.heldout)
    title = f"Held out, by {MARGINS.get(heldout.after.measure, heldout.after.measure)}"
    told = "; ".join(_distributed(part, above=not heldout.after.lower_is_better) for part in bars)
    if sum(len(part.values) for part in bars) >= CLIPPED_FROM:
        notes.append("The outermost half percent on each side is in the first and the last bar.")
    svg = draw_histogram("h-heldout", bars) if bars else ""
    keys = [Key(part.label, part.colour % COLOURS, False) for part in bars]
    return Figure(title, svg, f"{title}. {told}.", f"{told}. {' '.join(notes)}", keys)


def _distributed(part: Bars, above: bool) -> str:
    share = f", {(part.values > TIE).mean():.1%} above 0" if above else ""
    median = number(float(np.median(part.values)))
    return f"{part.label}: {len(part.values):,} values, median {median}{share}"


def _values(rows: HeldoutRows) -> NDArray[np.float64]:
    return np.array([row.value for row in rows.rows if math.isfinite(row.value)])


def number(value: float | None) -> str:
    """For people: four digits, and words for what is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
