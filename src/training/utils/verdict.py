"""Is it learning? What a run's held-out numbers say, in words, with what to try where they say no.

Nothing is concluded that the numbers do not carry: a share has its interval, and without held-out rows there is no
answer.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from training.utils.checkpoints import finite
from training.utils.displacement import Reading
from training.utils.intervals import Interval, of_mean, wilson
from training.utils.measures import MARGINS, Measure
from training.utils.run_record import Heldout, RunRecord
from training.utils.words import counted

Kind = Literal["yes", "no", "unclear", "unknown"]

MAIN_LOSSES = ("dpo_loss", "orpo_loss", "sft_loss", "loss")
"""The first of these that a run has is its loss."""
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
    """The name, without `train/` or `eval/`, of the loss that a run minimises; none is of one source."""
    bare = [name.split("/", 1)[-1] for name in names if "source/" not in name]
    known = [name for name in MAIN_LOSSES if name in bare]
    return next(iter([*known, *(name for name in bare if name.endswith("loss"))]), None)


def accuracy_interval(metrics: Mapping[str, float], rows: int | None) -> Interval | None:
    """That which was logged, or else Wilson's where the number of rows is known."""
    if {"accuracy_low", "accuracy_high"} <= metrics.keys():
        return Interval(metrics["accuracy_low"], metrics["accuracy_high"])
    return wilson(metrics["accuracy"], rows) if rows else None


def verdict_of(run: RunRecord) -> Verdict:
    """By preferences where there is an accuracy, else by the loss."""
    known = replace(run, before=finite(run.before), after=finite(run.after))
    kind, answer = _answer(known)
    if run.after and _all_lost(known):
        kind, answer = "no", "No: not one held-out row has finite log-probabilities."
    elif run.after and not known.after:  # of an older run, which left out none of its rows
        kind, answer = "unknown", "Not known: some rows that are not finite have spoiled every held-out mean."
    return Verdict(kind, answer, list(_facts(known)), list(_warnings(known)))


def _all_lost(run: RunRecord) -> bool:
    """Whether no held-out row has a number; the accuracy of an older run counts those that have none as wrong."""
    if run.heldout is not None and run.heldout.after.rows:
        return not run.heldout.after.finite
    return main_loss(run.after) is None and not {"accuracy", *MARGINS} & run.after.keys()


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
    if _began_with_ties(run):
        return _yes(run, "it prefers the chosen answers of {}")
    change = _change_of_rows(run.heldout) if run.heldout else None
    if change is None:
        change = Interval(*[run.after["accuracy"] - run.before["accuracy"]] * 2)
    if change.low > 0:
        return _yes(run, "it prefers the chosen answers of {}, and more so than before training")
    if change.high < 0:
        return "no", "No: it prefers the chosen answers, but less than it did before training."
    return "unclear", "Not shown: it prefers the chosen answers, as it did before training."


def _began_with_ties(run: RunRecord) -> bool:
    return "accuracy" not in run.before or run.before.get("tie_rate", 0.0) > COIN


def _by_loss(run: RunRecord) -> tuple[Kind, str]:
    loss = main_loss(run.after)
    if loss is None or loss not in run.before:
        return "unclear", "Not known: there is no held-out loss of before to compare with."
    fell = run.after[loss] < run.before[loss]
    change = _change_of_rows(run.heldout) if run.heldout and run.heldout.after.measure == loss else None
    if change is not None and not (change.high < 0 if fell else change.low > 0):
        return (
            "unclear",
            "Not shown: the held-out loss has come down on some rows and risen on others, as by chance.",
        )
    if fell:
        return _yes(run, "the loss on {} has come down")
    return (
        "no",
        "No: the held-out loss has not come down. A smaller learning rate, or fewer epochs, may help.",
    )


def _yes(run: RunRecord, claim: str) -> tuple[Kind, str]:
    """As far as the held-out rows are no training rows; `claim` has a place for what they are."""
    if run.leaked == 0:
        return "yes", f"Yes: {claim.format('rows that it was not trained on')}."
    if run.leaked is None:
        told = "whether they are among the training rows is not recorded"
        return "yes", f"Yes: {claim.format('the held-out rows')}; {told}."
    claim, verb = claim.format("the held-out rows"), "is" if run.leaked == 1 else "are"
    rows = run.heldout.after.lines if run.heldout else None
    if run.heldout and _holds_without(run.leaked, run, run.heldout):
        those = f"the {run.leaked:,} of {rows:,} that {verb} among the training rows"
        return "yes", f"Yes: {claim}; that would be so without {those}, too, whichever they are."
    which = "all" if run.leaked == rows else f"{run.leaked:,}"
    return "unclear", f"Not shown: {claim}, but {which} of them {verb} among the training rows."


def _holds_without(count: int, run: RunRecord, heldout: Heldout) -> bool:
    """Whether the answer would be yes if so many rows were not there: those that speak for it most."""
    if count >= heldout.after.lines:
        return False
    if "accuracy" in run.after:
        measure = Measure.of(heldout.after.measure, run.config)
        right = _by_line((row.line, float(measure.right(row))) for row in heldout.after.rows)
        left = sorted(right)[:-count]
        if wilson(statistics.fmean(left), len(left)).low <= COIN:
            return False
        if _began_with_ties(run):
            return True
    sign = -1 if heldout.after.lower_is_better else 1
    change = of_mean(sorted(sign * change for change in _changes(heldout))[:-count])
    return change is not None and change.low > 0


def _change_of_rows(heldout: Heldout) -> Interval | None:
    """Of the mean change of a row's value; None where there are too few for one."""
    return of_mean(_changes(heldout))


def _changes(heldout: Heldout) -> list[float]:
    """How each row's value has changed: in the mean over its pairs, which hang together."""
    before = {(row.line, row.pair): row.value for row in heldout.before.rows}
    changes = (
        (row.line, row.value - before.get((row.line, row.pair), math.nan)) for row in heldout.after.rows
    )
    return _by_line((line, change) for line, change in changes if math.isfinite(change))


def _by_line(values: Iterable[tuple[int, float]]) -> list[float]:
    """The mean of the values of each line."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for line, value in values:
        found[line].append(value)
    return [statistics.fmean(of_line) for of_line in found.values()]


def _facts(run: RunRecord) -> Iterator[str]:
    before, after, rows = run.before, run.after, _rows(run)
    if "accuracy" in after:
        interval = accuracy_interval(after, rows)
        within = f" (95 % interval {interval.low:.3f} to {interval.high:.3f})" if interval else ""
        yield f"Accuracy{_counted_rows(run)}: {_change(before, after, 'accuracy', '.3f')}{within}."
    for name in MARGINS:
        if name in after:
            measure = Measure.of(name, run.config)
            yield f"Mean {measure.title}: {_change(before, after, name, measure.form)}."
    for compared, since in (("delta_logp", "Against the reference"), ("since_start", "Since the start")):
        if {f"{compared}/chosen", f"{compared}/rejected"} <= after.keys():
            chosen, rejected = after[f"{compared}/chosen"], after[f"{compared}/rejected"]
            yield (
                f"{since}, chosen answers changed by "
                f"{chosen:+z.2f} nats of log-probability and rejected ones by {rejected:+z.2f}."
            )
    loss = main_loss(after)
    if loss is not None:
        yield f"Held-out {loss}: {_change(before, after, loss, '.4f')}."
    if "perplexity" in after:
        yield f"Held-out perplexity: {_change(before, after, 'perplexity', '.2f')}."
    if "tie_rate" in after:
        yield f"Ties: {_change(before, after, 'tie_rate', '.1%')}. A tie does not count as correct."


def _counted_rows(run: RunRecord) -> str:
    rows = _rows(run)
    if rows is None or run.heldout is None:
        return ""
    after = run.heldout.after
    pairs = len(after.finite if "nonfinite_rows" in run.after else after.rows)
    of = f" of the {counted(pairs, 'pair')}" if pairs != rows else ""
    return f"{of} of {counted(rows, 'held-out row')}"


def _change(before: Mapping[str, float], after: Mapping[str, float], name: str, form: str) -> str:
    now = f"{after[name]:{form}}"
    return f"{before[name]:{form}} → {now}" if name in before else f"{now} (before: not known)"


def _warnings(run: RunRecord) -> Iterator[str]:
    yield from (f"{doubt}." for doubt in run.doubts)
    yield from _not_finite(run)
    now, start = Reading.of_heldout(run.after), Reading.of_start(run.before)
    if now and start and (displaced := now.displaced(start)):
        yield f"{displaced[0].upper()}{displaced[1:]}."
    yield from _past_its_best(run)
    if skipped := int(run.metrics.last("train/skipped_steps") or 0):
        was, its = ("was", "its") if skipped == 1 else ("were", "their")
        yield f"{counted(skipped, 'step')} {was} skipped: {its} loss or gradient was not finite."
    if truncated := run.after.get("truncated", 0.0):
        yield f"{truncated:.1%} of the held-out rows were cut to max_seq_len."
    if (rows := _rows(run)) and rows < FEW:
        are = "is" if rows == 1 else "are"
        yield f"Only {counted(rows, 'row')} {are} held out: most differences between runs are chance."
    if lost := sum(run.lost.counts.values()):
        were = "was" if lost == 1 else "were"
        yield f"{counted(lost, 'row')} of the data {were} refused, dropped or shortened; see Rows lost."
    yield from (f"{problem}." for problem in run.unread)


def _not_finite(run: RunRecord) -> Iterator[str]:
    """Held-out rows that say nothing: they are not counted, but older runs took them into all their means."""
    left_out = int(run.after.get("nonfinite_rows", 0))
    if left_out:
        are, their = ("is", "its") if left_out == 1 else ("are", "their")
        yield f"{counted(left_out, 'held-out row')} {are} left out: {their} log-probabilities are not finite."
    elif run.heldout and (lost := len(run.heldout.after.nonfinite_lines)):
        has, counts = ("has", "it counts") if lost == 1 else ("have", "they count")
        wrong = f"; {counts} as wrong" if "accuracy" in run.after else ""
        yield (
            f"{counted(lost, 'held-out row')} {has} log-probabilities that are not finite: no mean over all rows is "
            f"finite{wrong}."
        )


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
    """How many rows are held out and counted, where that is known."""
    if run.heldout is None:
        return None
    after = run.heldout.after
    return len({row.line for row in after.finite}) if "nonfinite_rows" in run.after else after.lines
