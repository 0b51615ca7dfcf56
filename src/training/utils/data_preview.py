"""Rows as the model will see them: decoded tokens, special ones included, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from firesteel.sdk.errors import RowError
from firesteel.sdk.types import FloatArray
from training.utils.jsonl import located_rows
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedAnswers, Renderer
from training.utils.row_check import RenderedRow, RowKind
from training.utils.row_forms import ERRORS_SHOWN, refuse_nothing_left
from training.utils.row_outcomes import Rendering
from training.utils.tokenizer import Tokens


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together and are all scored, or all not."""

    text: str
    tokens: int
    scored: bool


@dataclass(frozen=True)
class ShownPart:
    """One part of a row: the prompt, or an answer to it."""

    name: str
    pieces: tuple[Piece, ...]
    cut: int = 0
    """Tokens that do not fit and are left out."""


@dataclass(frozen=True)
class Preview:
    """One row: its parts, or why there are none."""

    path: str
    line: int
    form: str = ""
    parts: tuple[ShownPart, ...] = ()
    problem: str = ""
    """Why it makes no pair; empty where it does."""


def previews(
    path: str, renderer: Renderer, kind: RowKind[Any], rules: Rendering, rows: int
) -> Iterator[Preview]:
    """The first rows of a file that make pairs, and some of those before them that do not.

    Raises DataError if there is none that does.
    """
    shown, lost = 0, 0
    first: list[RowError] = []
    for row in located_rows(path):
        if shown == rows:
            return
        try:
            rendered = kind.render(row, renderer)
            parts = _parts(renderer, rendered.answers, _fitted(rendered, rules))
        except ExampleError as error:
            lost += 1
            if lost <= ERRORS_SHOWN:
                first.append(error.at(path, row.line))
                yield Preview(path, row.line, problem=str(error))
            continue
        shown += 1
        yield Preview(path, row.line, rendered.form, parts)
    if not shown:
        refuse_nothing_left(path, first, lost, kind.shapes)


def _fitted(rendered: RenderedRow[Any], rules: Rendering) -> RenderedAnswers:
    """What is left under the limit. Raises ExampleError for a row that is dropped."""
    answers = rendered.answers
    if not (too_long := rules.too_long(answers.lengths)):
        return answers
    if rules.truncate == "drop":
        raise ExampleError("max_seq_len", f"dropped: {too_long}")
    outcome = rendered.outcome(rules)
    if outcome.outcome == "dropped":
        raise ExampleError("max_seq_len", f"dropped: {outcome.reason}")
    assert rules.max_seq_len is not None
    return answers.cut(rules.max_seq_len)


def _parts(renderer: Renderer, whole: RenderedAnswers, fitted: RenderedAnswers) -> tuple[ShownPart, ...]:
    start = fitted.prompt_len
    first = next(iter(fitted.sides.values()))
    prompt = ShownPart("prompt", _pieces(renderer, first.tokens[:start], first.mask[:start]))
    answers = (
        ShownPart(
            name,
            _pieces(renderer, side.tokens[start:], side.mask[start:]),
            len(whole.sides[name].tokens) - len(side.tokens),
        )
        for name, side in fitted.sides.items()
    )
    return (prompt, *answers) if start else tuple(answers)


def _pieces(renderer: Renderer, tokens: Tokens, mask: FloatArray) -> tuple[Piece, ...]:
    pieces = []
    for scored, group in groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1])):
        some = [token for token, _ in group]
        pieces.append(Piece(str(renderer.tokenizer.decode(some)), len(some), scored))
    return tuple(pieces)
