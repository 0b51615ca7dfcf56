"""`report.html`: what a run was, what it came to, and whether it learns; or several runs beside each other.

The page holds everything it shows: no script, no font, no address. What comes from data is escaped, and cut to what a
person looks at.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from firesteel.sdk.errors import ConfigError, StorageError
from firesteel.sealed import replace_file
from training.utils.heldout_rows import HeldoutRow
from training.utils.report_charts import SOURCE_PREFIX, Figure, figures
from training.utils.row_excerpts import excerpt, read_back
from training.utils.run_folder import REPORT
from training.utils.run_record import Answer, Heldout, RunRecord, read_run
from training.utils.verdict import Verdict, verdict_of
from training.utils.words import counted, number

TEMPLATE = "report.html.jinja"
MARK = '<meta name="generator" content="firesteel report">'
"""Known by this, a page may be replaced by the next."""
PAIRS_SHOWN = 5
LONGEST_ANSWER = 2000
HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class MetricRow:
    """A line of a table of numbers."""

    name: str
    cells: Sequence[str]


@dataclass(frozen=True)
class PairView:
    """A held-out row, with its value before and after."""

    place: str
    before: str
    after: str
    tokens: str
    text: Mapping[str, str]
    """Its labelled parts; empty where they are not known."""


@dataclass(frozen=True)
class ExtremePairs:
    """The held-out rows at both ends."""

    measure: str
    worst: Sequence[PairView]
    best: Sequence[PairView]
    file: str
    without_text: str
    """Why their texts are not shown; empty where they are."""


@dataclass(frozen=True)
class Said:
    """What was answered to a prompt: by whom or when, and the text."""

    label: str
    text: str


@dataclass(frozen=True)
class Question:
    """A fixed prompt and its answers."""

    prompt: str
    answers: Sequence[Said]


@dataclass(frozen=True)
class RunView:
    """A run as it stands in the page."""

    name: str
    headline: str
    outcome: str
    verdict: Verdict
    run: RunRecord


@dataclass(frozen=True)
class Page:
    """All that the template reads."""

    title: str
    runs: Sequence[RunView]
    figures: Sequence[Figure]
    heldout: Sequence[MetricRow]
    training: Sequence[MetricRow]
    sources: Sequence[MetricRow]
    settings: Sequence[MetricRow]
    environment: Sequence[MetricRow]
    questions: Sequence[Question]
    extremes: ExtremePairs | None


def report_at_the_end(run: Path) -> str:
    """Write the report of a run that has just finished; what became of it, for people.

    A disk that is full is no reason to call a finished run failed.
    """
    started = time.monotonic()
    try:
        written = write_report([run])
    except (StorageError, ConfigError, OSError) as error:  # the last: of what draws, where it keeps its files
        return f"report: not written: {error}; once that is mended: firesteel report {run}"
    return f"report: {written} ({time.monotonic() - started:.1f} s)"


def write_report(runs: Sequence[Path], to: Path | None = None) -> Path:
    """Write the page of these runs; the default is in the run's folder, of several in the current one.

    Raises `CheckpointError` for what is no run, `ConfigError` for a file that is there and no report.
    """
    target = to or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT))
    _refuse_foreign(target)
    page = page_of([read_run(run) for run in runs])
    replace_file(target, render(page).encode("utf-8", "replace"))
    return target


def render(page: Page) -> str:
    """The page as HTML."""
    import jinja2

    template = files("training.utils").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(page=page, mark=MARK, **SHOWN)


def without_checkpoints(run: RunRecord) -> str:
    """What that means for a run that has none; nothing for one that is finished."""
    interval = run.config.get("dcp_save_interval")
    if run.state == "finished":
        return ""
    if not interval:
        return " This run cannot be gone on with: it saves none (dcp_save_interval)."
    every = f"every {counted(interval, 'step')} (dcp_save_interval)"
    if run.state == "running":
        return f" One is saved {every}."
    return f" It ended before its first; one is saved {every}. Started again, it begins at its first step."


SHOWN = {"number": number, "excerpt": excerpt, "without_checkpoints": without_checkpoints}
"""What the template calls."""


def page_of(runs: Sequence[RunRecord]) -> Page:
    """What the page says."""
    alone = runs[0] if len(runs) == 1 else None
    named = dict(zip(_names([run.path for run in runs]), runs, strict=True))
    return Page(
        title=str(alone.path) if alone else f"{len(runs)} runs",
        runs=[
            RunView(name, _headline(run), _outcome(run), verdict_of(run), run) for name, run in named.items()
        ],
        figures=list(figures(named)),
        heldout=list(_heldout_table(runs)),
        training=list(_training_table(runs)),
        sources=list(_source_table(runs)),
        settings=list(_settings(runs)),
        environment=list(_environment(runs)),
        questions=list(_questions(named)),
        extremes=_extremes(alone, alone.heldout) if alone and alone.heldout else None,
    )


def _refuse_foreign(target: Path) -> None:
    try:
        with target.open("rb") as file:
            if MARK.encode() not in file.read(2000):
                raise ConfigError(f"{target} is there already and is no report; name another file with --to")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{target}: {error}; name a file that can be written to with --to") from error


def _names(paths: Sequence[Path]) -> list[str]:
    """Without the folder that holds all of them. Raises `ConfigError` for a run named twice."""
    full = [os.path.abspath(path) for path in paths]
    if len(set(full)) < len(full):
        raise ConfigError(f"{', '.join(map(str, paths))}: a run is named twice")
    if len(full) == 1:
        return [str(paths[0])]
    parent = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, parent) for path in full]


def _headline(run: RunRecord) -> str:
    config, rank = run.config, run.config.get("lora_rank")
    weights = f"an adapter of rank {rank}" if rank else "all weights"
    data = run.environment.data if run.environment else {}
    rows = [
        data[kind] for kind in ("pairs", "examples") if isinstance(data.get(kind), int)
    ]  # one of each row
    counts = [counted(count, "row") for count in rows]
    if run.heldout:
        lines, pairs = run.heldout.after.lines, len(run.heldout.after.rows)
        counts.append(f"{lines:,} held out" + (f": {counted(pairs, 'pair')}" if pairs != lines else ""))
    of = f" ({', '.join(counts)})" if counts else ""
    return (
        f"{run.recipe.upper()} run: {weights} of {config['base_model']}, trained on {config['dataset']}{of}."
    )


def _outcome(run: RunRecord) -> str:
    step = run.metrics.last_step
    if run.state == "finished":
        seconds = run.summary.get("training_seconds")
        took = f" The last process trained for {_duration(seconds)}." if isinstance(seconds, float) else ""
        return f"Finished after {counted(int(run.summary.get('steps', step)), 'step')}.{took}"
    state = "Still running" if run.state == "running" else "Not finished"
    if run.environment is None:
        return f"{state}: {counted(step, 'step')} {'is' if step == 1 else 'are'} logged."
    total = run.environment.total_steps
    return f"{state}: {step:,} of {counted(total, 'step')} {'is' if total == 1 else 'are'} logged."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _heldout_table(runs: Sequence[RunRecord]) -> Iterator[MetricRow]:
    """Every held-out metric: of one run before and after, of several after."""
    for name in dict.fromkeys(name for run in runs for name in (*run.before, *run.after)):
        if name.startswith(SOURCE_PREFIX.removeprefix("eval/")):
            continue
        if len(runs) == 1:
            sides: list[Mapping[str, float]] = [runs[0].before, runs[0].after]
        else:
            sides = [run.after for run in runs]
        yield MetricRow(name, [number(side.get(name)) for side in sides])


def _training_table(runs: Sequence[RunRecord]) -> Iterator[MetricRow]:
    """Every metric of the steps: of one run first, last, lowest and highest, of several the last."""
    names = dict.fromkeys(name for run in runs for name in run.metrics.series if not name.startswith("eval/"))
    for name in names:
        if len(runs) > 1:
            yield MetricRow(name, [number(run.metrics.last(name)) for run in runs])
            continue
        series = runs[0].metrics.series[name]
        finite = series.values[series.values == series.values]
        ends = [number(float(v)) for v in (finite.min(), finite.max())] if len(finite) else ["–", "–"]
        yield MetricRow(name, [number(series.first), number(series.last), *ends])


def _source_table(runs: Sequence[RunRecord]) -> Iterator[MetricRow]:
    """Metrics by source, as `<source>/<metric>`."""
    for name in dict.fromkeys(name for run in runs for name in run.metrics.series):
        if not name.startswith(SOURCE_PREFIX):
            continue
        found = [run.metrics.series.get(name) for run in runs]
        if len(runs) == 1 and found[0] is not None:
            cells = [number(found[0].first), number(found[0].last)]
        else:
            cells = [number(series.last if series else None) for series in found]
        yield MetricRow(name.removeprefix(SOURCE_PREFIX), cells)


def _settings(runs: Sequence[RunRecord]) -> Iterator[MetricRow]:
    """All settings of one run; of several those that differ, but for where each run is."""
    flat = [dict(_flat(run.config)) for run in runs]
    for name in dict.fromkeys(name for settings in flat for name in settings):
        cells = [_shown(settings.get(name, "–")) for settings in flat]
        if len(runs) == 1 or (len(set(cells)) > 1 and name != "log_path"):
            yield MetricRow(name, cells)


def _environment(runs: Sequence[RunRecord]) -> Iterator[MetricRow]:
    known = [run.environment for run in runs]
    flat = [
        dict(_flat({"began or went on (UTC)": e.started, **e.trainer, **e.machine, **e.versions, **e.data}))
        if e
        else {}
        for e in known
    ]
    for name in dict.fromkeys(name for facts in flat for name in facts):
        cells = [_shown(facts.get(name, "–")) for facts in flat]
        if len(runs) == 1 or len(set(cells)) > 1:
            yield MetricRow(name, cells)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return excerpt("; ".join(map(str, value))) or "none"
    text = str(value)
    return f"{text[:12]}…" if HASH.fullmatch(text) else excerpt(text)


def _questions(runs: Mapping[str, RunRecord]) -> Iterator[Question]:
    """Each prompt with what was said before, once where all runs said the same, and after by each run."""
    by_prompt: dict[str, dict[str, Answer]] = {}
    for name, run in runs.items():
        for answer in run.answers:
            by_prompt.setdefault(answer.prompt, {})[name] = answer
    for prompt, answers in by_prompt.items():
        before = {name: answer.before for name, answer in answers.items()}
        if len(set(before.values())) == 1:
            before = {"": next(iter(before.values()))}
        told = "(was not asked)"
        said = [
            Said(_label("before", name), excerpt(told if a is None else a, LONGEST_ANSWER))
            for name, a in before.items()
        ]
        for name, answer in answers.items():
            said.append(
                Said(_label("after", name if len(runs) > 1 else ""), excerpt(answer.after, LONGEST_ANSWER))
            )
        yield Question(excerpt(prompt, LONGEST_ANSWER), said)


def _label(when: str, run: str) -> str:
    return f"{when}, {run}" if run else when


def _extremes(run: RunRecord, heldout: Heldout) -> ExtremePairs:
    sign = -1 if heldout.after.lower_is_better else 1
    finite = [row for row in heldout.after.rows if math.isfinite(row.value)]
    ranked = sorted(finite, key=lambda row: (sign * row.value, row.line, row.pair))
    shown = min(PAIRS_SHOWN, (len(ranked) + 1) // 2)
    worst, best = ranked[:shown], ranked[::-1][: min(shown, len(ranked) - shown)]
    path, sha256 = _heldout_file(run)
    texts = read_back(path, sha256, {row.line for row in (*worst, *best)})
    before = {(row.line, row.pair): row.value for row in heldout.before.rows}
    several = {row.line for row in heldout.after.rows if row.pair > 1}

    def view(row: HeldoutRow) -> PairView:
        tokens = ", ".join(f"{side} {count:,}" for side, count in row.tokens.items())
        text = {} if isinstance(texts, str) or row.line not in texts else texts[row.line].pair(row.pair)
        place = f"Line {row.line}" + (f", pair {row.pair}" if row.line in several else "")
        was = before.get((row.line, row.pair))
        return PairView(place, number(was), number(row.value), tokens, text)

    return ExtremePairs(
        heldout.after.measure,
        [view(row) for row in worst],
        [view(row) for row in best],
        str(run.config.get("eval_dataset") or run.config["dataset"]),
        texts if isinstance(texts, str) else "",
    )


def _heldout_file(run: RunRecord) -> tuple[Path, str | None]:
    """Where the held-out rows are, and the hash of that file when the run began."""
    setting = "eval_dataset" if run.config.get("eval_dataset") else "dataset"
    start = run.environment.working_folder if run.environment else "."
    data = run.environment.data if run.environment else {}
    return Path(start) / str(run.config[setting]), data.get(f"{setting} content")
