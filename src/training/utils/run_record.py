"""What a run has left in its folder, read for people: numbers, held-out rows, answers, lost rows, settings.

A run may be finished, running, stopped or damaged, of any recipe, and older than this program: what is not there is
absent here, and what cannot be read is counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from firesteel.sdk import CheckpointError
from training.utils.checkpoints import Listed, found_in
from training.utils.doubts import LEAKED_ROWS, Doubt
from training.utils.environment import Environment
from training.utils.heldout_rows import HeldoutRows, heldout_steps, read_heldout
from training.utils.run_folder import ENVIRONMENT, SUMMARY, is_a_run
from training.utils.runs import is_held
from training.utils.words import counted

LOST_ROWS_SHOWN = 5
STEP = "train/step"
RECIPES_BY_SETTING = {"orpo_lambda": "orpo", "beta": "dpo"}
"""What a run is of that does not say."""


@dataclass(frozen=True)
class Series:
    """One metric: its values, in the order in which they were logged; not a number where none was finite."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def is_known(self) -> bool:
        """Whether there is a finite value at all."""
        return bool(np.isfinite(self.values).any())

    @property
    def first(self) -> float:
        """The first value."""
        return float(self.values[0])

    @property
    def last(self) -> float:
        """The last value."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`."""

    series: Mapping[str, Series]
    """By name, in the order in which they first appear."""
    damaged: int
    """Lines that are no record of numbers, and are left out."""

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return int(max((series.steps.max() for series in self.series.values()), default=0))

    def last(self, name: str) -> float | None:
        """The last value of a metric, if there is one that is finite."""
        series = self.series.get(name)
        return series.last if series is not None and math.isfinite(series.last) else None


@dataclass(frozen=True)
class LostRow:
    """A line of `bad_rows.jsonl`."""

    file: str
    line: int
    outcome: str
    reason: str


@dataclass(frozen=True)
class LostRows:
    """Rows that were refused, dropped or shortened."""

    counts: Mapping[str, int]
    first: Sequence[LostRow]
    """The first few of each outcome."""


@dataclass(frozen=True)
class Answer:
    """A line of `samples.jsonl`."""

    prompt: str
    before: str | None
    after: str


@dataclass(frozen=True)
class Heldout:
    """The held-out rows before training, and after the newest evaluation."""

    before: HeldoutRows
    after: HeldoutRows
    step: int
    """Of the newest evaluation."""


@dataclass(frozen=True)
class RunRecord:
    """All of a run."""

    path: Path
    state: Literal["finished", "running", "stopped"]
    config: Mapping[str, Any]
    environment: Environment | None
    metrics: Metrics
    before: Mapping[str, float]
    """Held-out metrics before the first step, without `eval/`; not a number where one was not finite.

    Empty where they are not known."""
    after: Mapping[str, float]
    """Those of the newest evaluation."""
    summary: Mapping[str, Any]
    """Empty for a run that is not finished."""
    heldout: Heldout | None
    answers: Sequence[Answer]
    lost: LostRows
    checkpoints: Sequence[Listed]
    unread: Sequence[str]
    """What is there and could not be read, for people."""

    @property
    def doubts(self) -> Sequence[Doubt]:
        """What was said of its data at the start, as far as that is known."""
        return (self.environment.doubts if self.environment else None) or ()

    @property
    def leaked(self) -> int | None:
        """How many held-out rows are among the training rows; None for an older run, which has not noted it."""
        noted = self.environment and self.environment.doubts is not None
        if noted or not self.config.get("eval_dataset"):  # of one file whole prompts are held out
            return sum(doubt.rows for doubt in self.doubts if doubt.name == LEAKED_ROWS)
        data = self.environment.data if self.environment else {}
        same_file = data.get("dataset content") == data.get("eval_dataset content") is not None
        return self.heldout.after.lines if same_file and self.heldout else None

    @property
    def recipe(self) -> str:
        """Its verb on the command line."""
        if self.environment is not None:
            return self.environment.recipe
        return next((name for key, name in RECIPES_BY_SETTING.items() if key in self.config), "a")


def read_run(run: Path) -> RunRecord:
    """Raises `CheckpointError` for a folder that is not one of a run."""
    if not is_a_run(run / "config.json"):
        raise CheckpointError(f"{run} is not the folder of a run: it has no config.json of one")
    unread: list[str] = []
    metrics = read_metrics(run / "metrics.jsonl")
    summary = _summary(run)
    if metrics.damaged:
        unread.append(f"{lines_are(metrics.damaged, 'metrics.jsonl')} damaged and left out")
    before, after = _heldout_metrics(metrics, summary)
    if (steps := heldout_steps(run)) and steps[0] != 0:
        before = {}  # it went on with other held-out rows than it began with
    return RunRecord(
        path=run,
        state="finished" if summary else "running" if is_held(run) else "stopped",
        config=orjson.loads((run / "config.json").read_bytes()),
        environment=Environment.read(run / ENVIRONMENT),
        metrics=metrics,
        before=before,
        after=after,
        summary=summary,
        heldout=_heldout(run),
        answers=list(_answers(run / "samples.jsonl", unread)),
        lost=_lost(run / "bad_rows.jsonl", unread),
        checkpoints=_checkpoints(run, unread),
        unread=unread,
    )


def read_metrics(path: Path) -> Metrics:
    """Every number of a run. A line that is still being written is no damage."""
    steps: defaultdict[str, list[float]] = defaultdict(list)
    values: defaultdict[str, list[float]] = defaultdict(list)
    damaged = 0
    for raw in _lines(path):
        record = _record(raw)
        if record is None or not isinstance(record.get(STEP), int):
            damaged += raw.endswith(b"\n")
            continue
        for name, value in record.items():
            if name != STEP and isinstance(value, int | float | None):
                steps[name].append(record[STEP])
                values[name].append(math.nan if value is None else value)
    series = {name: Series(np.array(steps[name], float), np.array(values[name], float)) for name in steps}
    return Metrics(series, damaged)


def lines_are(count: int, name: str) -> str:
    """`3 lines of name are`."""
    return f"{counted(count, 'line')} of {name} {'is' if count == 1 else 'are'}"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _summary(run: Path) -> Mapping[str, Any]:
    try:
        return _record((run / SUMMARY).read_bytes()) or {}
    except FileNotFoundError:
        return {}


def _heldout_metrics(
    metrics: Metrics, summary: Mapping[str, Any]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Before training and after the newest evaluation; what a finished run says itself comes first."""
    of_eval = {
        name.removeprefix("eval/"): s for name, s in metrics.series.items() if name.startswith("eval/")
    }
    before = {name: s.first for name, s in of_eval.items() if s.steps[0] == 0}
    newest = max(
        (s.steps[-1] for s in of_eval.values()), default=0
    )  # a metric may be missing where rows were lost
    after = {name: s.last for name, s in of_eval.items() if s.steps[-1] == newest > 0}
    if summary:
        before, after = _numbers(summary.get("before")), _numbers(summary.get("after")) or after
    return before, after


def _numbers(metrics: object) -> dict[str, float]:
    """As in `metrics.jsonl`: what was not finite is null."""
    given = metrics.items() if isinstance(metrics, dict) else ()
    return {name: math.nan if value is None else value for name, value in given}


def _heldout(run: Path) -> Heldout | None:
    steps = heldout_steps(run)
    if len(steps) < 2 or steps[0] != 0:
        return None
    before, after = read_heldout(run, 0), read_heldout(run, steps[-1])
    if before is None or after is None or before.measure != after.measure:
        return None
    return Heldout(before, after, steps[-1])


def _answers(path: Path, unread: list[str]) -> Iterator[Answer]:
    for raw in _lines(path):
        record = _record(raw)
        if record is None or not isinstance(record.get("prompt"), str):
            unread.append("a line of samples.jsonl is damaged and left out")
            continue
        before = record.get("before")
        yield Answer(record["prompt"], None if before is None else str(before), str(record.get("after")))


def _lost(path: Path, unread: list[str]) -> LostRows:
    counts: Counter[str] = Counter()
    first: defaultdict[str, list[LostRow]] = defaultdict(list)
    damaged = 0
    for raw in _lines(path):
        try:
            row = LostRow(**(_record(raw) or {}))
        except TypeError:
            damaged += 1
            continue
        counts[row.outcome] += 1
        if len(first[row.outcome]) < LOST_ROWS_SHOWN:
            first[row.outcome].append(row)
    if damaged:
        unread.append(f"{lines_are(damaged, 'bad_rows.jsonl')} damaged and left out")
    return LostRows(dict(counts), [row for rows in first.values() for row in islice(rows, LOST_ROWS_SHOWN)])


def _checkpoints(run: Path, unread: list[str]) -> Sequence[Listed]:
    try:
        return found_in(run)
    except CheckpointError as error:
        unread.append(str(error))
        return []
