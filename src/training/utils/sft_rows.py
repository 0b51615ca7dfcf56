"""Rows of supervised data: a row makes one sequence, some of whose tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firesteel.sdk.types import Datum, IntArray
from training.utils.jsonl import LocatedRow
from training.utils.pairs import datum_of
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedSide, Renderer
from training.utils.row_check import PLACE, RowArray, prompt_key
from training.utils.row_outcomes import Rendering, RowOutcome
from training.utils.sft_data import FORMATS, read_sft_row


@dataclass(frozen=True)
class LearnedSequence:
    """A datum whose `weights` say how much each of its targets is learned; `line` is that of its row, from 1."""

    datum: Datum
    line: int


@dataclass(frozen=True)
class RenderedSequence:
    """See `row_check.RenderedRow`."""

    form: str
    offset: int
    line: int
    weight: float
    rendered: RenderedSide

    @property
    def record(self) -> tuple[int, ...]:
        """See `SftRows.record_type`."""
        tokens, mask = self.rendered.tokens, self.rendered.mask
        start = int(np.flatnonzero(mask)[0])
        return (self.offset, prompt_key(tokens[:start]), self.line, start, len(tokens), int(mask.sum()))

    def items(self, rules: Rendering) -> list[LearnedSequence]:
        """The one sequence."""
        tokens, mask = self.rendered.tokens[: rules.max_seq_len], self.rendered.mask[: rules.max_seq_len]
        return [LearnedSequence(datum_of(tokens, mask * np.float32(self.weight)), self.line)]

    def outcome(self, rules: Rendering) -> RowOutcome:
        """See `row_check.RenderedRow`."""
        too_long = rules.too_long(_length(len(self.rendered.tokens)))
        if self.rendered.mask[: rules.max_seq_len].any():
            return RowOutcome(self.line, "shortened", too_long)
        return RowOutcome(self.line, "dropped", f"{too_long}; what is left has no token that is learned")


class SftRows:
    """See `row_check.RowKind`."""

    name = "sft"
    item = "example"
    shapes: Sequence[str] = tuple(form.shape for form in FORMATS)
    record_type: np.dtype[np.void] = np.dtype(
        [
            *PLACE,
            ("tokens", "<u4"),
            ("learned", "<u4"),
        ]  # of the whole sequence; those of them that are learned
    )
    code: Sequence[str] = ("plain_texts", "sft_data", "sft_examples", "pairs", "sft_rows")

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedSequence:
        """See `row_check.RowKind`."""
        form, example = read_sft_row(row.raw, row.line)
        rendered = renderer.render_learned(example)
        if not rendered.mask[1:].any():
            raise ExampleError("row", "no token behind the first is learned: there is nothing to train on")
        return RenderedSequence(form, row.offset, row.line, example.weight, rendered)

    def lengths(self, record: np.void) -> dict[str, int]:
        """See `row_check.RowKind`."""
        return _length(int(record["tokens"]))

    def longest(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        longest: IntArray = records["tokens"].astype(np.int64)
        return longest

    def made(self, records: RowArray) -> str:
        """See `row_check.RowKind`."""
        tokens, learned = int(records["tokens"].sum()), int(records["learned"].sum())
        return f"{len(records):,} examples, {learned:,} of {tokens:,} tokens learned"


def _length(tokens: int) -> dict[str, int]:
    return {"the example": tokens}


SFT = SftRows()
