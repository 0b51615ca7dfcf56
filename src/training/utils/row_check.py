"""One row at a time: whether it can be used, how long it is, or exactly why it cannot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.data_findings import DataFinding, RowArray
from training.utils.jsonl import LocatedRow
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedAnswers, Renderer
from training.utils.row_forms import FormatTally
from training.utils.row_outcomes import Rendering, RowOutcome

T_co = TypeVar("T_co", covariant=True)

# What is kept of every usable row; a kind of row adds lengths of its own.
PLACE = [
    ("offset", "<u8"),  # where it starts in the file
    ("prompt", "<u8"),  # hash of the prompt's tokens: equal prompts are held out together
    ("line", "<u4"),
    ("prompt_len", "<u4"),  # tokens
]
# What the data check knows rows by (`data_findings`), for kinds that it looks at.
CHECKED = [
    ("content", "<u8"),  # hash of the tokens behind the prompt, of all answers in their order
    ("tokens", "<u4"),  # of all whole sequences
    ("saved", "<u4"),  # of these, how many others begin with too: they need not be computed
    ("signs", "<u4"),  # `row_signs.Sign`
]


class RenderedRow(Protocol[T_co]):
    """A row that can be used, if it is not too long."""

    @property
    def form(self) -> str:
        """Which of the accepted forms it has."""

    @property
    def record(self) -> tuple[int, ...]:
        """What is kept of it, see `RowKind.record_type`."""

    def items(self, rules: Rendering) -> Sequence[T_co]:
        """What it makes; it is not longer than the rules allow, or they shorten it."""

    def outcome(self, rules: Rendering) -> RowOutcome:
        """What becomes of it if it is longer than the rules allow, and they shorten."""

    @property
    def answers(self) -> RenderedAnswers:
        """Its sequences, to be shown; of one sequence nothing stands apart as a prompt."""


class RowKind(Protocol[T_co]):
    """What the rows of a file are to a recipe: preferences, or conversations."""

    name: str
    item: str
    """What a row makes, for people."""
    shapes: Sequence[str]
    """The forms that a row may have, for people."""
    record_type: np.dtype[np.void]
    """What is kept of a usable row: `PLACE`, and more."""
    code: Sequence[str]
    """Modules, beside those that all kinds use, on which it depends what a row becomes."""

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedRow[T_co]:
        """The row as tokens. Raises ExampleError."""

    def lengths(self, record: np.void) -> dict[str, int]:
        """Tokens of the row's longest sequences, by name."""

    def longest(self, records: RowArray) -> IntArray:
        """Tokens of the longest sequence of each row."""

    def counts(self, records: RowArray) -> IntArray:
        """How many items each row makes."""

    def made(self, records: RowArray, rules: Rendering) -> str:
        """What rows make, in words: `551 pairs`."""

    def in_characters(self, row: LocatedRow) -> RecordedRow:
        """The row read, and not rendered: its record, of characters in place of tokens. Raises ExampleError."""

    def parts(self, records: RowArray, longest: int | None) -> dict[str, IntArray]:
        """How long the prompts of rows are, and what follows them, by name; cut at the longest sequence."""

    def computed(self, records: RowArray, longest: int | None) -> IntArray:
        """How many tokens of each row are computed: beginnings that are shared count once."""

    def findings(self, records: RowArray) -> Iterator[DataFinding]:
        """What is wrong, or may be wrong, with rows that are used together."""


@dataclass(frozen=True)
class RecordedRow:
    """What is kept of a row."""

    form: str
    record: tuple[int, ...]


@dataclass(frozen=True)
class RefusedRow:
    """A row that cannot be used, whatever the limits."""

    line: int
    field: str
    reason: str


@dataclass(frozen=True)
class CheckedRows:
    """What became of some rows of a file, in order."""

    usable: RowArray
    refused: list[RefusedRow] = field(default_factory=list)
    formats: FormatTally = field(default_factory=FormatTally)


def check_rows(rows: Sequence[LocatedRow], renderer: Renderer, kind: RowKind[Any]) -> CheckedRows:
    """Read and render each row once. Raises ModelError where the tokenizer lacks what rows need."""
    usable, refused, formats = [], [], FormatTally()
    for row in rows:
        try:
            rendered = kind.render(row, renderer)
            formats.add(rendered.form, row.line)
            usable.append(rendered.record)
        except ExampleError as error:
            refused.append(RefusedRow(row.line, error.field, error.reason))
    return CheckedRows(np.array(usable, dtype=kind.record_type), refused, formats)


def prompt_key(tokens: Sequence[int]) -> int:
    """64 bits of a prompt."""
    return _key_of(np.asarray(tokens, dtype="<i8").tobytes())


def tokens_key(sequences: Sequence[Sequence[int]]) -> int:
    """64 bits that stand for what some sequences say, and their order."""
    parts = (np.asarray(tokens, dtype="<i8") for tokens in sequences)
    return _key_of(b"".join(len(part).to_bytes(8, "little") + part.tobytes() for part in parts))


def json_key(content: object) -> int:
    """The same for a text, messages, or whatever else is JSON."""
    return _key_of(json.dumps(content, sort_keys=True).encode())


def _key_of(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
