"""Rows as the model will see them: each token decoded, special ones included, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from firesteel.sdk.errors import RowError
from training.utils.jsonl import located_rows
from training.utils.preference_examples import ExampleError
from training.utils.rendering import RenderedAnswers, RenderedSide, Renderer
from training.utils.row_check import RenderedRow, RowKind
from training.utils.row_forms import ERRORS_SHOWN, refuse_nothing_left
from training.utils.row_outcomes import Rendering
from training.utils.token_texts import token_texts


@dataclass(frozen=True)
class ShownToken:
    """One token. The texts of all tokens of a prompt and its answer, one behind the other, are the decoded whole."""

    id: int
    text: str
    scored: bool
    unfinished: bool
    """It is the beginning of a character, whose text stands at the last of its tokens."""


@dataclass(frozen=True)
class ShownText:
    """The text of a token, or of several that make a character together."""

    text: str
    tokens: int
    scored: bool


@dataclass(frozen=True)
class ShownPart:
    """One part of a row: the prompt, or an answer to it."""

    name: str
    tokens: tuple[ShownToken, ...]
    cut: int = 0
    """Tokens that do not fit and are left out."""

    @property
    def scored(self) -> int:
        """How many of its tokens are."""
        return sum(token.scored for token in self.tokens)

    @property
    def texts(self) -> Iterator[ShownText]:
        """Its text, divided where its tokens are."""
        count = 0
        for token in self.tokens:
            count += 1
            if not token.unfinished:
                yield ShownText(token.text, count, token.scored)
                count = 0
        if count:  # the answers go on inside a character
            yield ShownText("", count, token.scored)


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
    shown = {name: _shown(renderer, side) for name, side in fitted.sides.items()}
    prompt = ShownPart("prompt", next(iter(shown.values()))[:start])
    answers = (
        ShownPart(name, tokens[start:], len(whole.sides[name].tokens) - len(tokens))
        for name, tokens in shown.items()
    )
    return (prompt, *answers) if start else tuple(answers)


def _shown(renderer: Renderer, side: RenderedSide) -> tuple[ShownToken, ...]:
    texts = []
    for each in token_texts(renderer.tokenizer, side.tokens):
        texts += [("", True)] * (each.tokens - 1) + [(each.text, False)]
    return tuple(
        ShownToken(token, text, bool(scored), unfinished)
        for token, scored, (text, unfinished) in zip(side.tokens, side.mask, texts, strict=True)
    )
