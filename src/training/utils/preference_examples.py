"""The forms of a preference example, after its row was read and before it is rendered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from firesteel.sdk.errors import DataError, RowError

Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = tuple[Message, ...]
Tools: TypeAlias = tuple[Mapping[str, Any], ...] | None


class ExampleError(DataError):
    """One example is unusable. Whoever knows its file and line makes it a `RowError` with `at`."""

    code = "data.example"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"

    def at(self, path: str, line: int) -> RowError:
        """The same error, located."""
        return RowError(path, line, self.field, self.reason)


@dataclass(frozen=True)
class ChatExample:
    """A conversation that goes on in two ways. Both responses start and end with an assistant turn.

    Where they have several turns, those that are not the assistant's or a tool's are the same on both sides.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: Tools
    line: int
    weight: float = 1.0
    source: str | None = None
    """Where the row says that it is from."""


@dataclass(frozen=True)
class PlainExample:
    """A text that goes on in two ways, without a chat template."""

    prompt: str
    chosen: str
    rejected: str
    line: int
    weight: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class TextExample:
    """Two whole texts; what they share at the start is their prompt."""

    chosen: str
    rejected: str
    line: int
    weight: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class RankedExample:
    """One prompt and several answers, best first: turns after a conversation, or texts after a text."""

    prompt: Messages | str
    answers: tuple[Messages | str, ...]
    ranks: tuple[float, ...]
    """Of each answer, smaller is better; answers of one rank are tied."""
    tools: Tools
    line: int
    weight: float = 1.0
    source: str | None = None

    @property
    def preferences(self) -> list[tuple[int, int]]:
        """Every two answers of which the first is better, by place."""
        places = combinations(range(len(self.answers)), 2)
        return [(better, worse) for better, worse in places if self.ranks[better] < self.ranks[worse]]

    @property
    def ties(self) -> int:
        """How many twos of answers are tied: they say nothing, and are dropped."""
        return math.comb(len(self.answers), 2) - len(self.preferences)


PreferenceExample: TypeAlias = ChatExample | PlainExample | TextExample | RankedExample
