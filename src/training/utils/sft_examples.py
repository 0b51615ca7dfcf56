"""The forms of a supervised example, after its row was read and before it is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from training.utils.preference_examples import Messages, Tools


@dataclass(frozen=True)
class TurnsExample:
    """A conversation of which some of the assistant's turns are learned; the first turn is not, the last is its."""

    messages: Messages
    learned: tuple[bool, ...]
    """Of each message."""
    tools: Tools
    line: int
    weight: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class CompletionExample:
    """A text and how it goes on, which is learned; no chat template."""

    prompt: str
    completion: str
    line: int
    weight: float = 1.0
    source: str | None = None


@dataclass(frozen=True)
class DocumentExample:
    """A text that is learned as it is, but for its first token."""

    text: str
    line: int
    weight: float = 1.0
    source: str | None = None


SftExample: TypeAlias = TurnsExample | CompletionExample | DocumentExample
