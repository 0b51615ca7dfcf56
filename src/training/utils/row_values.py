"""Values of a row: reaching them, comparing them, and showing them in errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TypeAlias, cast

from training.utils.preference_examples import ExampleError

Row: TypeAlias = Mapping[str, Any]


def required(holder: Row, key: str, place: str = "") -> Any:
    """The value of a key that must be there. Raises ExampleError naming the keys that are."""
    if key not in holder:
        raise ExampleError(field_path(place, key), f"missing; {keys_found(holder)}")
    return holder[key]


def required_object(row: Row, key: str) -> Row:
    """The same, where it must be an object."""
    value = required(row, key)
    if not isinstance(value, dict):
        raise ExampleError(key, f"{shown(value)}; expected an object with messages")
    return value


# These change what a conversation looks like to the model, and nothing here reads them.
_UNREAD = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio"), "only text can be trained on"),
    "documents": "documents are not rendered; put them into the messages",
    "chat_template_kwargs": "the chat template is run as it stands; put a changed one into the tokenizer",
}


def refuse_unread(row: Row) -> None:
    """Refuse what stands in a row beside its conversation and would be left out without a word."""
    for key, advice in _UNREAD.items():
        if row.get(key):
            raise ExampleError(key, f"{shown(row[key])}; {advice}")


def read_number(value: object, place: str, expected: str = "a finite number") -> float:
    """A number that can be computed with. Raises ExampleError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer of hundreds of digits
            if math.isfinite(number := float(value)):
                return number
    raise ExampleError(place, f"{shown(value)}; expected {expected}")


LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6


def read_weight(row: Row) -> float:
    """How much the row counts; 1 where it does not say. Raises ExampleError."""
    given = row.get("weight")
    expected = "a number above 0 (1e-6 to 1e6)"
    weight = 1.0 if given is None else read_number(given, "weight", expected)
    if not LEAST_WEIGHT <= weight <= LARGEST_WEIGHT:
        raise ExampleError("weight", f"{shown(given)}; expected {expected}")
    return weight


def read_source(row: Row) -> str | None:
    """The name of where the row is from; None where it does not say. Raises ExampleError."""
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise ExampleError("source", f"{shown(source)}; expected a string, the name of where the row is from")
    return source


def field_path(place: str, key: str) -> str:
    """Where a key stands: `chosen.messages`."""
    return f"{place}.{key}" if place else key


def same_json(one: object, other: object) -> bool:
    """Equal as JSON: Python alone takes true for 1."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def outer_form(value: object) -> str:
    """Which form of answer this is, by its outer type."""
    if isinstance(value, dict) and "messages" in value and "text" in value:
        return "an object with both messages and text"
    if isinstance(value, dict) and "messages" in value:
        return "an object with messages"
    if isinstance(value, str) or (isinstance(value, dict) and "text" in value):
        return "text"
    if isinstance(value, dict):
        return "an object without messages or text"
    return "a list" if isinstance(value, list) else "null" if value is None else "no text"


def shown(value: object) -> str:
    """A value for an error message: its kind, and so much of it as tells it from others."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {excerpt(value)}" if value else "an empty string"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"an object ({keys_found(cast('Row', value))})"


def keys_found(holder: Row) -> str:
    """The keys of an object, for an error about one that is missing."""
    keys = ", ".join(islice(holder, 12)) + (", …" if len(holder) > 12 else "")
    return f"the keys here are {keys}" if holder else "there are no keys here"


def excerpt(text: str, start: int = 0, length: int = 40) -> str:
    """A piece of a text, quoted."""
    quoted = json.dumps(text[start : start + length], ensure_ascii=False)
    return quoted if len(text) <= start + length else f'{quoted[:-1]}…"'
