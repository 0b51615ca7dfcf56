"""Which charts a report has, of which metrics, and what is said below each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.utils.charts import BINS, CLIPPED_FROM, COLOURS, Bars, Curve, draw_curves, draw_histogram
from training.utils.heldout_rows import HeldoutRows
from training.utils.measures import MARGINS, Measure, values_of
from training.utils.run_record import RunRecord, Series
from training.utils.verdict import main_loss
from training.utils.words import counted, number

SOURCE_PREFIX = "eval/source/"
BEFORE = "before"


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
    measure: Measure | None = None
    """Of runs whose values of one name are of several measures: those that are drawn."""

    @property
    def key(self) -> str:
        """What the chart's names within the page begin with."""
        return "c-" + re.sub(r"\W+", "-", self.title, flags=re.ASCII).strip("-").lower()


@dataclass(frozen=True)
class Spread:
    """How the values of the held-out rows of one evaluation are distributed."""

    label: str
    rows: HeldoutRows
    colour: int

    @property
    def bars(self) -> Bars:
        """As they are drawn."""
        return Bars(self.label, values_of(self.rows), self.colour)

    def told(self, measure: Measure) -> str:
        """In words."""
        finite = self.rows.finite
        right = sum(map(measure.right, finite)) / len(finite)
        share = f", {right:.1%} above 0" if measure.name in MARGINS else ""
        middle = number(float(np.median(values_of(self.rows))))
        return f"{self.label}: {counted(len(finite), 'value')}, median {middle}{share}"


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
    yield from _distributions(runs)


def _plans(runs: Mapping[str, RunRecord]) -> Iterator[Plan]:
    logged = (name for run in runs.values() for name in run.metrics.series)
    named = (name for name in logged if not name.startswith(SOURCE_PREFIX))  # these are drawn together
    names = dict.fromkeys(name.removeprefix("train/").removeprefix("eval/") for name in named)
    loss = main_loss(names)
    plans = [
        *([Plan(f"Loss ({loss})", (loss,))] if loss else []),
        Plan("Perplexity", ("perplexity",)),
        *(
            Plan(m.title.capitalize(), (m.name,), "Above 0, chosen is preferred.", 0, m)
            for m in dict.fromkeys(Measure.of(name, run.config) for name in MARGINS for run in runs.values())
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
            yield from (replace(plan, title=_title(plan, name), names=(name,)) for name in plan.names)


def _title(plan: Plan, name: str) -> str:
    return plan.title if len(plan.names) == 1 else f"{plan.title}: {name.rpartition('/')[2]}"


def _curves(plan: Plan, runs: Mapping[str, RunRecord]) -> Iterator[Curve]:
    for run_number, (run_name, run) in enumerate(runs.items()):
        for place, name in enumerate(plan.names):
            if plan.measure not in (None, Measure.of(name, run.config)):
                continue
            for heldout, series in _series_of(run, name):
                kind = "held out" if heldout else "training"
                label = kind if len(runs) == 1 else f"{run_name}, {kind}"
                if len(plan.names) > 1:
                    label = f"{name.rpartition('/')[2].removesuffix('_avg_lp')}, {kind}"
                alone = len(runs) == 1 and len(plan.names) == 1
                colour = int(heldout) if alone else run_number + place
                yield Curve(label, series.steps, series.values, colour, dashed=heldout)


def _series_of(run: RunRecord, name: str) -> Iterator[tuple[bool, Series]]:
    """In training, and held out, where there is a number."""
    of_run = run.metrics.series
    training = of_run.get(f"train/{name}") or of_run.get(name)
    for heldout, series in ((False, training), (True, of_run.get(f"eval/{name}"))):
        if series is not None and series.is_known:
            yield heldout, series


def _figure(plan: Plan, curves: Sequence[Curve]) -> Figure:
    missing = sum(int((~np.isfinite(curve.values)).sum()) for curve in curves)
    longest = max(len(curve.steps) for curve in curves)
    binned = (
        f"Line: mean of {longest // BINS:,} steps; shade: their range."
        if any(c.is_binned for c in curves)
        else ""
    )
    has = "has" if missing == 1 else "have"
    gaps = f"{counted(missing, 'step')} {has} no finite number." if missing else ""
    told = "; ".join(_told(curve) for curve in curves)
    return Figure(
        plan.title,
        draw_curves(plan.key, curves, plan.level),
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
            if name.startswith(SOURCE_PREFIX) and name.endswith(f"/{measure}") and series.is_known
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


def _distributions(runs: Mapping[str, RunRecord]) -> Iterator[Figure]:
    """Of the held-out values, each measure by itself: before and after of one run, or after of each of several."""
    by_measure: dict[Measure, list[Spread]] = {}
    for place, (name, run) in enumerate(runs.items()):
        if run.heldout is None:
            continue
        measure = Measure.of(run.heldout.after.measure, run.config)
        spreads = by_measure.setdefault(measure, [])
        if len(runs) > 1:
            spreads.append(Spread(name, run.heldout.after, place))
        else:
            spreads.append(Spread(BEFORE, run.heldout.before, 1))
            spreads.append(Spread(f"after step {run.heldout.step:,}", run.heldout.after, 0))
    for place, (measure, spreads) in enumerate(by_measure.items()):
        yield _distribution(f"h-{place}", measure, spreads)


def _distribution(key: str, measure: Measure, spreads: Sequence[Spread]) -> Figure:
    drawn, notes = [], []
    for spread in spreads:
        if spread.rows.finite and not (spread.label == BEFORE and measure.all_tied(spread.rows)):
            drawn.append(spread)
        elif spread.rows.finite:
            notes.append("Before training all are 0: the policy is its reference.")
        if lost := len(spread.rows.rows) - len(spread.rows.finite):
            notes.append(
                f"{spread.label}: {counted(lost, 'value')} {'is' if lost == 1 else 'are'} not finite."
            )
    bars = [spread.bars for spread in drawn]
    if sum(len(part.values) for part in bars) >= CLIPPED_FROM:
        notes.append("The outermost half percent on each side is in the first and the last bar.")
    title = f"Held out, by {measure.title}"
    told = "".join(f"{part}. " for part in ("; ".join(spread.told(measure) for spread in drawn),) if part)
    svg = draw_histogram(key, bars) if bars else ""
    keys = [Key(part.label, part.colour % COLOURS, False) for part in bars]
    return Figure(title, svg, f"{title}. {told}".strip(), f"{told}{' '.join(notes)}".strip(), keys)
