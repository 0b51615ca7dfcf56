"""The text of every token of a sequence, such that the texts behind each other are that of the whole.

A token decoded alone is not what it is among others: SentencePiece drops the space that it begins with, and a byte of
a character is none. So tokens are decoded behind those before them, and what comes to the text is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.utils.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What bytes are decoded to that are no character, or not yet."""
_BEFORE = 4
"""Texts that are decoded before each: what tokens say depends on those close to them."""


@dataclass(frozen=True)
class TokenText:
    """The text of a token, or of several that only together have one: the bytes of a character."""

    text: str
    tokens: int


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[TokenText]:
    """In order; all tokens are in one, and all text of the whole."""
    sequence = _Sequence(tokenizer, list(tokens))
    # Of a decoder that looks back further, every beginning is decoded: right by construction, and slow.
    return _joined(sequence.texts(_BEFORE) or sequence.texts(len(tokens)))


class _Sequence:
    def __init__(self, tokenizer: Tokenizer, tokens: list[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._whole = self._decoded(0, len(tokens))

    def texts(self, before: int) -> list[TokenText]:
        """With so many of them decoded before each; nothing if that does not lead to the whole text."""
        found: list[TokenText] = []
        starts, told = [0], 0
        for end in range(1, len(self._tokens) + 1):
            first, start = starts[max(0, len(starts) - 1 - before)], starts[-1]
            earlier, now = self._decoded(first, start), self._decoded(first, end)
            text = now[len(earlier) :]
            if now.startswith(earlier) and self._whole.startswith(text, told):
                found.append(TokenText(text, end - start))
                starts.append(end)
                told += len(text)
        complete = starts[-1] == len(self._tokens) and told == len(self._whole)
        return found if complete else []

    def _decoded(self, first: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[first:end])) if end > first else ""


def _joined(texts: Sequence[TokenText]) -> list[TokenText]:
    """With all bytes of what is no character together: its first ones already look like all of it."""
    joined: list[TokenText] = []
    for each in texts:
        if not each.text and joined and joined[-1].text.endswith(REPLACEMENT):
            each = TokenText(joined[-1].text, joined.pop().tokens + each.tokens)
        joined.append(each)
    return joined
