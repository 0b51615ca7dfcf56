"""Texts of a row that stand without messages: what each must look like, and what may not stand beside them."""

from __future__ import annotations

from training.utils.preference_examples import ExampleError
from training.utils.row_values import Row, required, shown

# Beside plain texts these would be left out of the conversation without a word.
PROMPT_LIKE_KEYS = ("prompt", "input", "instruction", "question", "query", "system", "history")


def read_text(value: object, place: str) -> str:
    """A string that says something. Raises ExampleError."""
    if not isinstance(value, str) or not value.strip():
        raise ExampleError(place, f"{shown(value)}; expected some text")
    return value


def read_whole_text(value: object, place: str) -> str:
    """The same, as it is or as `{"text": "…"}`."""
    if isinstance(value, dict):
        return read_text(required(value, "text", place), f"{place}.text")
    return read_text(value, place)


def refuse_same_texts(chosen: str, rejected: str, place: str) -> None:
    """Refuse two sides that do not differ; `place` is where the rejected one stands."""
    if chosen == rejected:
        raise ExampleError(place, "chosen and rejected are identical: there is nothing to prefer")


def refuse_what_text_leaves_out(row: Row) -> None:
    """Refuse a question or tools beside plain texts, which hold the whole conversation."""
    for key in PROMPT_LIKE_KEYS:
        if row.get(key) and row[key] != row.get("prompt"):
            raise ExampleError(
                key, "not used beside plain texts; put it into `prompt`, or write all three as messages"
            )
    if row.get("tools"):
        raise ExampleError("tools", "not used beside plain texts; write the conversation as messages")
