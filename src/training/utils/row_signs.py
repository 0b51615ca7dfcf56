"""What is odd about a row that makes a pair: a bit for each, kept in its index. Nothing here refuses a row.

A refusal is known by how it begins, in English only; scores by the names that public data sets give them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, TypeGuard

from training.utils.jsonl import LocatedRow, parse_row
from training.utils.preference_examples import Message, Messages
from training.utils.rendering import Renderer
from training.utils.row_values import Row
from training.utils.tokenizer import Tokens


class Sign(IntFlag):
    """One thing that is odd about a row."""

    SCORES_SWAPPED = 1
    """The row's own scores say that the rejected side is the better one."""
    CHOSEN_REFUSES = 2
    """Of more than two answers, the best."""
    REJECTED_REFUSES = 4
    """Of more than two answers, the worst."""
    SPECIAL_TEXT = 8
    """A message holds the text of a special token, which becomes that token."""
    DOUBLED_START = 16
    """Two beginning-of-sequence tokens."""
    DOUBLED_END = 32
    """Two end-of-sequence tokens."""
    THOUGHT_LEFT_OUT = 64
    """Reasoning of a turn that is not scored, where templates of reasoning models leave it out on purpose."""


_REFUSAL = re.compile(
    r"\W*(i['’]?m (very |really |truly )?sorry|i am sorry|sorry,|my apologies|i apologi[sz]e|i can(not|['’]t| not)\b|"
    r"i['’]m (unable|not able)|i am (unable|not able)|as an ai\b|i won['’]t|unfortunately, i can)",
    re.IGNORECASE,
)
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class RenderedTurns:
    """Some messages of a row, and the tokens in which they must be found."""

    messages: Messages
    tokens: Tokens


def signs_of(
    sequences: Sequence[Tokens], prompt: RenderedTurns, answers: Sequence[RenderedTurns], renderer: Renderer
) -> Sign:
    """Signs of a row's whole sequences, and of its messages where it has any."""
    signs = Sign(0)
    start, end = renderer.tokenizer.bos_token_id, renderer.tokenizer.eos_token_id
    if start is not None and sequences[0][:2] == (start, start):
        signs |= Sign.DOUBLED_START
    if end is not None and any(tokens[-2:] == (end, end) for tokens in sequences):
        signs |= Sign.DOUBLED_END
    contents = [message["content"] for turns in (prompt, *answers) for message in turns.messages]
    if any(text in content for content in contents for text in renderer.special_texts):
        signs |= Sign.SPECIAL_TEXT
    # Of one that is scored it is refused where it is rendered.
    if any(_loses_thought(turns, renderer) for turns in (prompt, *answers)):
        signs |= Sign.THOUGHT_LEFT_OUT
    return signs


def _loses_thought(turns: RenderedTurns, renderer: Renderer) -> bool:
    thoughts = [thought for message in turns.messages for thought in _thoughts(message)]
    if not thoughts:
        return False
    shown = str(renderer.tokenizer.decode(list(turns.tokens)))
    return not all(thought in shown for thought in thoughts)


def signs_of_preference(row: LocatedRow, best: str, worst: str) -> Sign:
    """Signs of what is preferred to what; they need no tokenizer."""
    signs = Sign(0)
    if _REFUSAL.match(best):
        signs |= Sign.CHOSEN_REFUSES
    if _REFUSAL.match(worst):
        signs |= Sign.REJECTED_REFUSES
    if b"score" in row.raw and _scores_swapped(parse_row(row.raw)):
        signs |= Sign.SCORES_SWAPPED
    return signs


def said(turns: Messages | str) -> str:
    """The contents of some turns, or a text."""
    return turns if isinstance(turns, str) else "\n".join(message["content"] for message in turns)


def _scores_swapped(row: Row) -> bool:
    """By scores that stand beside the two sides, or in them."""
    sides = [side if isinstance(side, dict) else {} for side in (row.get("chosen"), row.get("rejected"))]
    found = [(row.get(one), row.get(other)) for one, other in _SCORES]
    found.append((sides[0].get("score"), sides[1].get("score")))
    return any(_is_number(one) and _is_number(other) and one < other for one, other in found)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thoughts(message: Message) -> Iterator[str]:
    if message["role"] != "assistant":
        return
    for field in _THOUGHT_FIELDS:
        if isinstance(message.get(field), str) and message[field].strip():
            yield message[field].strip()
    for thought in _THOUGHT.findall(message["content"]):
        if thought.strip():
            yield thought.strip()
