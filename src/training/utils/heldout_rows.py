"""What an evaluation says of each held-out row: `heldout/step-<n>.jsonl`, a line for each row.

Two of them are kept, that of before training and the newest: 140 bytes a pair each. There is no text in them; a row is
found again by its line in the data file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from firesteel.sdk.types import Datum
from firesteel.sealed import replace_file, storage_errors
from training.utils.losses import weight_of
from training.utils.run_folder import HELDOUT

if TYPE_CHECKING:
    from training.utils.losses import PairObjective, PairScores

_OF_SIDES = ("_tokens", "_logp")
DIGITS = 6
"""Behind the point: a millionth of a nat."""


@dataclass(frozen=True)
class HeldoutRow:
    """One row of an evaluation."""

    line: int
    """In its data file, from 1."""
    value: float
    """Of the evaluation's measure; not a number where it was not finite."""
    tokens: Mapping[str, int]
    """Scored tokens, by side."""
    pair: int = 1
    """Which of the pairs that the row makes: a ranked list makes several."""
    logps: Mapping[str, float] = field(default_factory=dict)
    """Log-probabilities summed over the scored tokens, by side; empty for rows without sides."""

    @property
    def is_finite(self) -> bool:
        """Whether all its numbers are: others are left out of the metrics."""
        return all(map(math.isfinite, (self.value, *self.logps.values())))


@dataclass(frozen=True)
class HeldoutRows:
    """All rows of one evaluation."""

    measure: str
    """The metric that the values are of, as `margin`."""
    rows: Sequence[HeldoutRow]

    @property
    def has_sides(self) -> bool:
        """Whether these are pairs."""
        return any(row.logps for row in self.rows)

    @property
    def nonfinite_lines(self) -> list[int]:
        """Of the rows that have a number that is not finite."""
        return sorted({row.line for row in self.rows if not row.is_finite})

    @property
    def lower_is_better(self) -> bool:
        """Whether the measure is a loss."""
        return self.measure.endswith("loss")

    @property
    def finite(self) -> Sequence[HeldoutRow]:
        """Those that count in metrics."""
        lost = set(self.nonfinite_lines)  # a list of which one answer is lost is left out as a whole
        return [row for row in self.rows if row.line not in lost]

    @property
    def lines(self) -> int:
        """How many rows of the data file these are of: the pairs of one ranked list are of one."""
        return len({row.line for row in self.rows})


def rows_of_pairs(lines: Sequence[int], scores: PairScores, objective: PairObjective) -> HeldoutRows:
    """The margin of each pair, how long its sides are, and how likely."""
    sides = {"chosen": scores.chosen, "rejected": scores.rejected}
    tokens = {name: side.tokens.tolist() for name, side in sides.items()}
    logps = {name: side.policy.tolist() for name, side in sides.items()}
    rows: list[HeldoutRow] = []
    for place, (line, margin) in enumerate(
        zip(lines, objective.margins(scores).values.tolist(), strict=True)
    ):
        row = HeldoutRow(
            line,
            margin,
            {name: int(counts[place]) for name, counts in tokens.items()},
            rows[-1].pair + 1 if rows and rows[-1].line == line else 1,
            {name: values[place] for name, values in logps.items()},
        )
        rows.append(row)
    return HeldoutRows(objective.margin_name, rows)


def row_of_nll(line: int, datum: Datum, nll: float) -> HeldoutRow:
    """The mean negative log-likelihood of a sequence's learned tokens, by their weights; `nll` is the sum."""
    learned = int(np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()))
    return HeldoutRow(line, nll / weight_of(datum), {"learned": learned})


def write_heldout(run: Path, step: int, evaluated: HeldoutRows) -> None:
    """Write what an evaluation after this step says; of earlier ones that of step 0 stays."""
    folder, content = run / HELDOUT, bytearray()
    for row in evaluated.rows:
        tokens = {f"{side}_tokens": count for side, count in row.tokens.items()}
        which = {"pair": row.pair} if row.pair > 1 else {}
        logps = {f"{side}_logp": round(logp, DIGITS) for side, logp in row.logps.items()}
        told = {"line": row.line, **which, evaluated.measure: round(row.value, DIGITS), **tokens, **logps}
        content += orjson.dumps(told) + b"\n"
    with storage_errors(folder, len(content)):
        folder.mkdir(exist_ok=True)
        replace_file(folder / f"step-{step}.jsonl", bytes(content))
        for other in heldout_steps(run):
            if other not in (0, step):
                (run / heldout_name(other)).unlink()


def heldout_name(step: int) -> str:
    """Of the file, relative to the run folder."""
    return f"{HELDOUT}/step-{step}.jsonl"


def heldout_steps(run: Path) -> list[int]:
    """The steps after which there is such a file, in order."""
    numbers = (path.stem.removeprefix("step-") for path in (run / HELDOUT).glob("step-*.jsonl"))
    return sorted(int(number) for number in numbers if number.isdigit())


def read_heldout(run: Path, step: int) -> HeldoutRows | None:
    """What an evaluation said; None where that is not known, or not as it was written."""
    try:
        lines = (run / heldout_name(step)).read_bytes().splitlines()
        records: list[dict[str, Any]] = [orjson.loads(line) for line in lines]
        measure = next(n for n in records[0] if n not in ("line", "pair") and not n.endswith(_OF_SIDES))
        return HeldoutRows(measure, [_row(record, measure) for record in records])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None


def _row(record: Mapping[str, Any], measure: str) -> HeldoutRow:
    tokens = {n.removesuffix("_tokens"): int(c) for n, c in record.items() if n.endswith("_tokens")}
    logps = {n.removesuffix("_logp"): _number(v) for n, v in record.items() if n.endswith("_logp")}
    return HeldoutRow(
        int(record["line"]), _number(record[measure]), tokens, int(record.get("pair", 1)), logps
    )


def _number(value: float | None) -> float:
    """One that was not finite is null in JSON."""
    return math.nan if value is None else float(value)
