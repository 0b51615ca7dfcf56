"""Is it learning? What a run's held-out numbers say, in words, with what to try where they say no.

Nothing is concluded that the numbers do not carry: a share has its interval, and without held-out rows there is no
answer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from training.utils.displacement import Reading
from training.utils.intervals import Z_95, Interval, wilson
from training.utils.run_record import Heldout, RunRecord

Kind = Literal["yes", "no", "unclear", "unknown"]

MAIN_LOSSES = ("dpo_loss", "orpo_loss", "sft_loss", "loss")
"""The first of these that a run has is its loss."""
MARGINS = {"margin": "margin", "log_odds_ratio": "log odds ratio"}
COIN = 0.5
SEEN = 1e-3
"""A loss that has risen by less is the same to people."""
FEW = 30
"""Held-out rows: fewer tell little."""


@dataclass(frozen=True)
class Verdict:
    """What to think of a run."""

    kind: Kind
    answer: str
    """One line."""
    facts: Sequence[str]
    """What it rests on, a sentence each."""
    warnings: Sequence[str]
    """What is wrong or may be, each with what to try."""


def main_loss(names: Mapping[str, object]) -> str | None:
    """The name, without `train/` or `eval/`, of the loss that a run minimises."""
    bare = [name.split("/", 1)[-1] for name in names]
    known = [name for name in MAIN_LOSSES if name in bare]
    return next(iter([*known, *(name for name in bare if name.endswith("loss"))]), None)


def accuracy_interval(metrics: Mapping[str, float], rows: int | None) -> Interval | None:
    """That which was logged, or else Wilson's where the number of rows is known."""
    if {"accuracy_low", "accuracy_high"} <= metrics.keys():
        return Interval(metrics["accuracy_low"], metrics["accuracy_high"])
    return wilson(metrics["accuracy"], rows) if rows else None


def verdict_of(run: RunRecord) -> Verdict:
    """By preferences where there is an accuracy, else by the loss."""
    kind, answer = _answer(run)
    return Verdict(kind, answer, list(_facts(run)), list(_warnings(run)))


def _answer(run: RunRecord) -> tuple[Kind, str]:
    if not run.after:
        if run.before:
            return "unknown", "Not known yet: no evaluation since training began."
        return (
            "unknown",
            "Not known: no rows were held out. Give eval_dataset, or eval_fraction to hold out some.",
        )
    if "accuracy" in run.after:
        return _by_accuracy(run)
    return _by_loss(run)


def _by_accuracy(run: RunRecord) -> tuple[Kind, str]:
    accuracy = run.after["accuracy"]
    interval = accuracy_interval(run.after, _rows(run))
    if interval is None:
        return "unclear", f"Held-out accuracy is {accuracy:.3f}; of how many rows is not recorded."
    if run.after.get("tie_rate", 0) > COIN:
        return "no", "No: most held-out margins are still ties. The policy has hardly moved."
    if interval.low > COIN:
        return _since_the_start(run)
    if _surely_rejected(run):
        return (
            "no",
            "No: it prefers the rejected answers. Look whether chosen and rejected are the wrong way round.",
        )
    if interval.high < COIN:
        return "unclear", "Not shown: many held-out margins are still ties. Train longer."
    return (
        "unclear",
        "Not shown: these held-out rows do not tell it from a coin. Train longer, or hold out more.",
    )


def _surely_rejected(run: RunRecord) -> bool:
    """Whether even with every tie taken as right less than half would be."""
    share = min(run.after["accuracy"] + run.after.get("tie_rate", 0.0), 1.0)
    rows = _rows(run)
    return (wilson(share, rows).high if rows else share) < COIN


def _since_the_start(run: RunRecord) -> tuple[Kind, str]:
    """Of a policy that prefers the chosen answers: whether it did so before. At the reference all margins are ties."""
    yes = "Yes: it prefers the chosen answers of rows that it was not trained on."
    if "accuracy" not in run.before or run.before.get("tie_rate", 0.0) > COIN:
        return "yes", yes
    change = _change_of_rows(run.heldout) if run.heldout else None
    if change is None:
        change = Interval(*[run.after["accuracy"] - run.before["accuracy"]] * 2)
    if change.low > 0:
        return "yes", f"{yes[:-1]}, and more so than before training."
    if change.high < 0:
        return "no", "No: it prefers the chosen answers, but less than it did before training."
    return "unclear", "Not shown: it prefers the chosen answers, as it did before training."


def _by_loss(run: RunRecord) -> tuple[Kind, str]:
    loss = main_loss(run.after)
    if loss is None or loss not in run.before:
        return "unclear", "Not known: there is no held-out loss of before to compare with."
    before, after = run.before[loss], run.after[loss]
    change = _change_of_rows(run.heldout) if run.heldout and run.heldout.after.measure == loss else None
    if change is not None and change.low <= 0 <= change.high:
        return (
            "unclear",
            "Not shown: the held-out loss has come down on some rows and risen on others, as by chance.",
        )
    if after < before:
        return "yes", "Yes: the loss on rows that it was not trained on has come down."
    return (
        "no",
        "No: the held-out loss has not come down. A smaller learning rate, or fewer epochs, may help.",
    )


def _change_of_rows(heldout: Heldout) -> Interval | None:
    """Of the mean change of a row's value; None where there are too few for one."""
    before = {(row.line, row.pair): row.value for row in heldout.before.rows}
    changes = [row.value - before.get((row.line, row.pair), math.nan) for row in heldout.after.rows]
    finite = [change for change in changes if math.isfinite(change)]
    if len(finite) < 2:
        return None
    mean, half = statistics.fmean(finite), Z_95 * statistics.stdev(finite) / math.sqrt(len(finite))
    return Interval(mean - half, mean + half)


def _facts(run: RunRecord) -> Iterator[str]:
    before, after, rows = run.before, run.after, _rows(run)
    if "accuracy" in after:
        interval = accuracy_interval(after, rows)
        within = f" (95 % interval {interval.low:.3f} to {interval.high:.3f})" if interval else ""
        of = f" of {rows:,} held-out rows" if rows else ""
        yield f"Accuracy{of}: {_change(before, after, 'accuracy', '.3f')}{within}."
    for name, title in MARGINS.items():
        if name in after:
            yield f"Mean {title}: {_change(before, after, name, '+.2f')}."
    if "delta_logp/chosen" in after:
        chosen, rejected = after["delta_logp/chosen"], after["delta_logp/rejected"]
        yield (
            "Against the reference, chosen answers changed by "
            f"{chosen:+.2f} nats of log-probability and rejected ones by {rejected:+.2f}."
        )
    if "since_start/chosen" in after:
        chosen, rejected = after["since_start/chosen"], after["since_start/rejected"]
        yield (
            "Since the start, chosen answers changed by "
            f"{chosen:+.2f} nats of log-probability and rejected ones by {rejected:+.2f}."
        )
    loss = main_loss(after)
    if loss is not None:
        yield f"Held-out {loss}: {_change(before, after, loss, '.4f')}."
    if "perplexity" in after:
        yield f"Held-out perplexity: {_change(before, after, 'perplexity', '.2f')}."
    if "tie_rate" in after:
        yield f"Ties: {_change(before, after, 'tie_rate', '.1%')}. A tie does not count as correct."


def _change(before: Mapping[str, float], after: Mapping[str, float], name: str, form: str) -> str:
    now = f"{after[name]:{form}}"
    return f"{before[name]:{form}} → {now}" if name in before else f"{now} (before: not known)"


def _warnings(run: RunRecord) -> Iterator[str]:
    now, start = Reading.of_heldout(run.after), Reading.of_start(run.before)
    if now and start and (displaced := now.displaced(start)):
        yield f"{displaced[0].upper()}{displaced[1:]}."
    yield from _past_its_best(run)
    if skipped := int(run.metrics.last("train/skipped_steps") or 0):
        yield f"{skipped:,} steps were skipped: their loss or gradient was not finite."
    if truncated := run.after.get("truncated", 0.0):
        yield f"{truncated:.1%} of the held-out rows were cut to max_seq_len."
    if (rows := _rows(run)) and rows < FEW:
        yield f"Only {rows} rows are held out: most differences between runs are chance."
    if lost := sum(run.lost.counts.values()):
        yield f"{lost:,} rows of the data were refused, dropped or shortened; see Rows lost."
    yield from (f"{problem}." for problem in run.unread)


def _past_its_best(run: RunRecord) -> Iterator[str]:
    """Where the held-out loss was clearly lower earlier."""
    loss = main_loss(run.after)
    series = run.metrics.series.get(f"eval/{loss}")
    if series is None or len(series.values) < 3:
        return
    best = min(range(len(series.values)), key=lambda i: _or_infinite(float(series.values[i])))
    lowest, gained = float(series.values[best]), series.first - float(series.values[best])
    if series.steps[best] > 0 and series.last > lowest + max(0.1 * gained, SEEN):
        yield (
            f"The held-out {loss} was lowest after step {int(series.steps[best]):,} ({lowest:.4f}) and has risen to "
            f"{series.last:.4f}: train shorter, or keep the best checkpoint (keep_best)."
        )


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _rows(run: RunRecord) -> int | None:
    """How many rows are held out. The pairs of one ranked list hang together: they count as one."""
    return len({row.line for row in run.heldout.after.rows}) if run.heldout else None
