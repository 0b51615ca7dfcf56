"""Rows of supervised data: a row makes one sequence, some of whose tokens are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import Datum, IntArray
from training.utils.data_findings import DataFinding, findings_of
from training.utils.jsonl import LocatedRow
from training.utils.pairs import datum_of
from training.utils.preference_examples import ExampleError, Messages
from training.utils.rendering import RenderedAnswers, RenderedSide, Renderer
from training.utils.row_check import RecordedRow
from training.utils.row_outcomes import Rendering, RowOutcome
from training.utils.row_records import (
    CHECKED,
    PLACE,
    KeptRows,
    RankedAnswer,
    RowArray,
    json_key,
    tokens_key,
)
from training.utils.row_signs import RenderedTurns, Sign, said, signs_of
from training.utils.sft_data import DOCUMENT, FORMATS, read_sft_row
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample, TurnsExample
from training.utils.tokenizer import Tokens

LEARNED_BEFORE_THE_CUT = "learned, before the cut"


@dataclass(frozen=True)
class LearnedSequence:
    """A datum whose `weights` say how much each of its targets is learned; `line` is that of its row, from 1."""

    datum: Datum
    line: int
    source: str | None = None
    """Where the row is from, if it says so."""
    truncated: bool = False
    """Whether it lost its end to the limit."""


@dataclass(frozen=True)
class RenderedSequence:
    """See `row_check.RenderedRow`."""

    form: str
    offset: int
    line: int
    weight: float
    rendered: RenderedSide
    signs: Sign
    source: str | None

    @property
    def record(self) -> tuple[int, ...]:
        """See `SftRows.record_type`."""
        tokens, mask = self.rendered.tokens, self.rendered.mask
        start = int(np.flatnonzero(mask)[0])
        # A text has no prompt: no two of them are one group for being learned from their second token on.
        asked = tokens if self.form == DOCUMENT else tokens[:start]
        place = (self.offset, tokens_key(asked), self.line, start)
        return (*place, tokens_key(tokens[start:]), len(tokens), 0, int(self.signs), int(mask.sum()))

    @property
    def ranked(self) -> Sequence[RankedAnswer]:
        """See `row_check.RenderedRow`."""
        return ()

    @property
    def answers(self) -> RenderedAnswers:
        """See `row_check.RenderedRow`."""
        return RenderedAnswers(0, {"the example": self.rendered}, preferences=())

    def items(self, rules: Rendering) -> list[LearnedSequence]:
        """The one sequence."""
        tokens, mask = self.rendered.tokens[: rules.max_seq_len], self.rendered.mask[: rules.max_seq_len]
        datum = datum_of(tokens, mask * np.float32(self.weight))
        truncated = len(tokens) < len(self.rendered.tokens)
        return [LearnedSequence(datum, self.line, self.source, truncated)]

    def outcome(self, rules: Rendering) -> RowOutcome:
        """See `row_check.RenderedRow`."""
        too_long = rules.too_long(_length(len(self.rendered.tokens)))
        if self.rendered.mask[: rules.max_seq_len].any():
            return RowOutcome(self.line, "shortened", too_long)
        return RowOutcome(self.line, "dropped", f"{too_long}; what is left has no token that is learned")


class SftRows:
    """See `row_check.RowKind`."""

    name = "sft"
    rows = "supervised rows"
    item = "example"
    advice = "train on these with `firesteel sft`"
    shapes: Sequence[str] = tuple(form.shape for form in FORMATS)
    record_type: np.dtype[np.void] = np.dtype(
        [
            *PLACE,
            *CHECKED,
            ("learned", "<u4"),  # tokens that are
        ]
    )
    code: Sequence[str] = ("plain_texts", "sft_data", "sft_examples", "pairs", "row_signs", "sft_rows")

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedSequence:
        """See `row_check.RowKind`."""
        form, example = read_sft_row(row.raw, row.line)
        rendered = renderer.render_learned(example)
        if not rendered.mask[1:].any():
            raise ExampleError("row", "no token behind the first is learned: there is nothing to train on")
        signs = _signs(example, rendered.tokens, renderer)
        place = (form, row.offset, row.line)
        return RenderedSequence(*place, example.weight, rendered, signs, example.source)

    def in_characters(self, row: LocatedRow) -> RecordedRow:
        """See `row_check.RowKind`."""
        form, example = read_sft_row(row.raw, row.line)
        asked, learned = _asked_and_learned(example)
        tools = example.tools if isinstance(example, TurnsExample) else None
        start, length = len(said(asked)), len(said(learned))
        place = (row.offset, json_key([asked, tools]), row.line, start)
        return RecordedRow(form, (*place, json_key(learned), start + length, 0, 0, length))

    def parts(self, records: RowArray, longest: int | None) -> dict[str, IntArray]:
        """See `row_check.RowKind`.

        Which tokens are learned is not kept, only how many and where they begin. So it is known what a cut leaves of
        them where all are learned from there on, and said to be before the cut where that is not so.
        """
        tokens, learned = (records[name].astype(np.int64) for name in ("tokens", "learned"))
        whole = self.computed(records, longest)
        prompt = np.minimum(records["prompt_len"].astype(np.int64), whole)
        parts = {"prompt": prompt, "rest": whole - prompt}
        without_gaps = learned == tokens - records["prompt_len"]
        if without_gaps[whole < tokens].all():
            return parts | {"learned": np.minimum(learned, whole - prompt)}
        return parts | {LEARNED_BEFORE_THE_CUT: learned}

    def computed(self, records: RowArray, longest: int | None) -> IntArray:
        """See `row_check.RowKind`."""
        whole: IntArray = np.minimum(records["tokens"].astype(np.int64), longest or np.iinfo(np.int64).max)
        return whole

    def findings(self, rows: KeptRows) -> Iterator[DataFinding]:
        """See `row_check.RowKind`."""
        return findings_of(rows)

    def lengths(self, record: np.void) -> dict[str, int]:
        """See `row_check.RowKind`."""
        return _length(int(record["tokens"]))

    def longest(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        longest: IntArray = records["tokens"].astype(np.int64)
        return longest

    def counts(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        return np.ones(len(records), np.int64)

    def made(self, records: RowArray, rules: Rendering) -> str:
        """See `row_check.RowKind`."""
        tokens, learned = int(records["tokens"].sum()), int(records["learned"].sum())
        cut = rules.max_seq_len is not None and bool((records["tokens"] > rules.max_seq_len).any())
        before = " (before they are shortened)" if cut else ""
        return f"{len(records):,} examples, {learned:,} of {tokens:,} tokens learned{before}"


def _signs(example: SftExample, tokens: Tokens, renderer: Renderer) -> Sign:
    asked, learned = _asked_and_learned(example)
    parts = [RenderedTurns(() if isinstance(part, str) else part, tokens) for part in (asked, learned)]
    return signs_of([tokens], parts[0], parts[1:], renderer)


def _asked_and_learned(example: SftExample) -> tuple[Messages | str, Messages | str]:
    """What stands before the first token that is learned, and all from there on."""
    match example:
        case TurnsExample():
            first = example.learned.index(True)
            return example.messages[:first], example.messages[first:]
        case CompletionExample():
            return example.prompt, example.completion
        case DocumentExample():
            return "", example.text


def _length(tokens: int) -> dict[str, int]:
    return {"the example": tokens}


SFT = SftRows()
