"""One row at a time: whether it makes a pair, how long that is, or exactly why it makes none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from training.utils.jsonl import LocatedRow
from training.utils.pairs import render_usable
from training.utils.preference_data import FormatTally, read_row
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedPair, Renderer

# What is kept of a row that makes a pair: 32 bytes.
ROW = np.dtype(
    [
        ("offset", "<u8"),  # where it starts in the file
        ("prompt", "<u8"),  # hash of the prompt's tokens: equal prompts are held out together
        ("line", "<u4"),
        ("prompt_len", "<u4"),  # tokens
        ("chosen", "<u4"),  # tokens of the whole side
        ("rejected", "<u4"),
    ]
)
RowArray = np.ndarray[tuple[int], np.dtype[np.void]]


@dataclass(frozen=True)
class RefusedRow:
    """A row that makes no pair, whatever the limits."""

    line: int
    field: str
    reason: str


@dataclass(frozen=True)
class CheckedRows:
    """What became of some rows of a file, in order."""

    usable: RowArray
    refused: list[RefusedRow] = field(default_factory=list)
    formats: FormatTally = field(default_factory=FormatTally)


def check_rows(rows: Sequence[LocatedRow], renderer: Renderer) -> CheckedRows:
    """Read and render each row once. Raises ModelError where the tokenizer lacks what rows need."""
    usable, refused, formats = [], [], FormatTally()
    for row in rows:
        try:
            name, example = read_row(row.raw, row.line)
            formats.add(name, row.line)
            usable.append(_kept(row, render_usable(renderer, example)))
        except ExampleError as error:
            refused.append(RefusedRow(row.line, error.field, error.reason))
    return CheckedRows(np.array(usable, dtype=ROW), refused, formats)


def prompt_key(tokens: Sequence[int]) -> int:
    """64 bits of a prompt."""
    content = np.asarray(tokens, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _kept(row: LocatedRow, rendered: RenderedPair) -> tuple[int, ...]:
    prompt = rendered.chosen_tokens[: rendered.prompt_len]
    sides = len(rendered.chosen_tokens), len(rendered.rejected_tokens)
    return (row.offset, prompt_key(prompt), row.line, rendered.prompt_len, *sides)
