"""A row of preference data says what it is, or exactly why not: `file:line: field: reason`.

One JSON object per line, UTF-8, as it is or gzipped. Every row of a file has the same one of these forms:

=================  =============================================================================
messages           {"chosen": {"messages": […]}, "rejected": {"messages": […]}}
preferred_output   {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}
prompt-messages    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
prompt-text        {"prompt": "…", "chosen": "…", "rejected": "…"}
message-lists      {"chosen": [messages], "rejected": [messages]}
text               {"chosen": {"text": "…"}, "rejected": {"text": "…"}}, or two bare strings
samples            {"samples": [{"messages": […], "score": 1.0}, {"messages": […], "score": 0.0}]}
=================  =============================================================================

`tools` (a list of function schemas) may stand beside messages. Of messages everything is kept, except that
a list of text parts becomes one string and null content (beside tool_calls) becomes "", which every template
can show.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NoReturn, TypeAlias, cast

from firesteel.sdk.errors import ConfigError, DataError, RowError

Row: TypeAlias = Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]
Messages: TypeAlias = tuple[Message, ...]
Tools: TypeAlias = tuple[Mapping[str, Any], ...] | None
OnBadRow = Literal["fail", "skip"]

MAX_ROW_BYTES = 50_000_000
ERRORS_SHOWN = 10
LINES_SHOWN = 3

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ACCEPTED = (
    '`chosen` and `rejected` (each {"messages": […]}, {"text": "…"}, a list of messages or a string; with or '
    "without `prompt`), `input` with `preferred_output` and `non_preferred_output`, or `samples`"
)
# What is not the model's own or its tools' doing: it must be the same on both sides.
ASKING_ROLES = ("system", "developer", "user")
# Beside bare strings these would be left out of the conversation without a word.
PROMPT_LIKE_KEYS = ("prompt", "input", "instruction", "question", "query", "system", "history")


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


@dataclass(frozen=True)
class PlainExample:
    """A text that goes on in two ways, without a chat template."""

    prompt: str
    chosen: str
    rejected: str
    line: int


@dataclass(frozen=True)
class TextExample:
    """Two whole texts; what they share at the start is their prompt."""

    chosen: str
    rejected: str
    line: int


PreferenceExample: TypeAlias = ChatExample | PlainExample | TextExample


@dataclass(frozen=True)
class PreferenceFile:
    """What a file holds: its good rows, and for each bad one where and why. `rows` counts both."""

    path: str
    format: str
    examples: tuple[PreferenceExample, ...]
    bad: tuple[RowError, ...]
    rows: int


def read_preferences(path: str | Path, on_bad_row: OnBadRow = "fail") -> PreferenceFile:
    """Read and check every row of a JSONL file (`.gz` or not).

    Bad rows are left out and listed (`"skip"`), or refused all at once (`"fail"`): a `RowError` where there
    is one, a `DataError` that lists the first ten where there are more. Either way raises DataError for a
    file that cannot be read, holds no usable row, or mixes formats.
    """
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row: {on_bad_row!r} is neither 'fail' nor 'skip'")
    location = str(path)
    examples: list[PreferenceExample] = []
    bad: list[RowError] = []
    lines_of_format: dict[str, list[int]] = {}
    for line, raw in _numbered_rows(location):
        try:
            row = _parse(raw)
            form = _format_of(row)
            examples.append(form.read(row, line))
            lines_of_format.setdefault(form.name, []).append(line)
        except ExampleError as error:
            bad.append(error.at(location, line))
    _refuse_mixed_formats(location, lines_of_format)
    if on_bad_row == "fail":
        refuse_rows(location, bad)
    if not examples:
        _refuse_nothing_left(location, bad)
    (name,) = lines_of_format
    return PreferenceFile(location, name, tuple(examples), tuple(bad), len(examples) + len(bad))


def refuse_rows(path: str, bad: Sequence[RowError]) -> None:
    """Raise one error for all these rows of one file; return if there are none."""
    if not bad:
        return
    if len(bad) == 1:
        raise bad[0]
    more = "" if len(bad) <= ERRORS_SHOWN else f"\n  and {len(bad) - ERRORS_SHOWN} more"
    shown = "".join(f"\n  {error}" for error in bad[:ERRORS_SHOWN])
    raise DataError(
        f"{path}: {len(bad)} rows cannot be used:{shown}{more}\n"
        'Mend or remove them, or leave them out with on_bad_row="skip".'
    )


def _refuse_nothing_left(path: str, bad: Sequence[RowError]) -> NoReturn:
    if not bad:
        raise DataError(
            f"{path}: the file is empty; expected one JSON object per line, as one of {_shapes()}"
        )
    shown = "".join(f"\n  {error}" for error in bad[:ERRORS_SHOWN])
    raise DataError(f"{path}: none of its {len(bad)} rows can be used:{shown}")


def _refuse_mixed_formats(path: str, lines_of_format: Mapping[str, Sequence[int]]) -> None:
    if len(lines_of_format) < 2:
        return
    found = "; ".join(f"{name} in {_lines_text(lines)}" for name, lines in lines_of_format.items())
    raise DataError(
        f"{path}: its rows are of {len(lines_of_format)} formats: {found}. Keep each in a file of its own."
    )


def _lines_text(lines: Sequence[int]) -> str:
    numbers = ", ".join(str(line) for line in lines[:LINES_SHOWN])
    more = "" if len(lines) <= LINES_SHOWN else f" and {len(lines) - LINES_SHOWN} more"
    return f"line {numbers}" if len(lines) == 1 else f"lines {numbers}{more}"


# --- bytes → rows -------------------------------------------------------------------------------------------


def _numbered_rows(path: str) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number from 1. A line over the limit is cut just behind it."""
    try:
        with _open(path) as stream:
            for line, raw in enumerate(_bounded_lines(stream), start=1):
                row = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if line == 1:
                    _refuse_foreign_file(path, row)
                if row.strip():
                    yield line, row
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _open(path: str) -> IO[bytes]:
    stream = open(path, "rb")  # noqa: SIM115  # closed by the caller's `with`
    if stream.peek(2)[:2] != b"\x1f\x8b":
        return stream
    stream.close()
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _bounded_lines(stream: IO[bytes]) -> Iterator[bytes]:
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        rest = raw
        while not rest.endswith(b"\n") and (rest := stream.readline(MAX_ROW_BYTES)):
            pass  # what is over the limit is read in pieces and forgotten
        yield raw


def _refuse_foreign_file(path: str, first_line: bytes) -> None:
    """Known by its first line: what is not JSON Lines at all, where an error per line would help nobody."""
    start = first_line.strip()
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    if start.startswith(b"PAR1"):
        raise DataError(f"{path}: the file is Parquet; write its rows as JSON Lines")
    if start.startswith(b"[") and start[1:].lstrip()[:1] in (b"", b"{"):
        raise DataError(f"{path}: the file is one JSON array; expected one object per line (`jq -c '.[]'`)")


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice; JSON readers differ in which one they keep."""

    key: str = ""


class _NotFinite(str):
    """NaN, Infinity or -Infinity where JSON has a number."""


def _parse(raw: bytes) -> Row:
    """The JSON object of one line. Raises ExampleError."""
    if len(raw) > MAX_ROW_BYTES:
        raise ExampleError("row", f"more than {MAX_ROW_BYTES:,} bytes in one line")
    try:
        row = _decoded(raw)
        _refuse_unusable_values(row, "")
    except RecursionError:
        raise ExampleError("row", "nested too deeply to be read") from None
    if not isinstance(row, dict):
        raise ExampleError("row", f"{_kind(row)}; expected an object")
    return row


def _decoded(raw: bytes) -> object:
    try:
        text = raw.decode("utf-8").rstrip()  # with its line end, an error at the end would be in column 1
        return json.loads(text, object_pairs_hook=_object, parse_constant=_NotFinite)
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise ExampleError("row", f"not UTF-8: {place}") from None
    except json.JSONDecodeError as error:
        raise ExampleError("row", f"not valid JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ExampleError("row", f"not usable as JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    keys = [key for key, _ in pairs]
    repeated = _Repeated(content)
    repeated.key = next(key for key in keys if keys.count(key) > 1)
    return repeated


def _refuse_unusable_values(value: object, place: str) -> None:
    """Refuse what Python's JSON reader lets through although it is not JSON, or not text."""
    if isinstance(value, _NotFinite):
        raise ExampleError(place or "row", f"{value} is not JSON; write a number or null")
    if isinstance(value, str):
        _refuse_unusable_text(value, place or "row")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unusable_values(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        if isinstance(value, _Repeated):
            raise ExampleError(
                _under(place, value.key), f"the key {value.key!r} is there twice in one object"
            )
        for key, item in value.items():
            _refuse_unusable_text(key, _under(place, ascii(key)))
            _refuse_unusable_values(item, _under(place, key))


def _refuse_unusable_text(text: str, place: str) -> None:
    if "\0" in text:
        raise ExampleError(place, f"a NUL character at position {text.index(chr(0))}; remove it")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ExampleError(
            place,
            f"half a character ({half}, a lone surrogate) at position {error.start}; the text was cut",
        ) from None


# --- messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Conversation:
    """Checked messages, and for each where it stands in its row."""

    messages: Messages
    places: tuple[str, ...]

    def __add__(self, other: _Conversation) -> _Conversation:
        return _Conversation(self.messages + other.messages, self.places + other.places)


def _conversation(value: object, place: str) -> _Conversation:
    if not isinstance(value, list):
        raise ExampleError(place, f"{_kind(value)}; expected a list of messages")
    if not value:
        raise ExampleError(place, "an empty list; expected at least one message")
    places = tuple(f"{place}[{index}]" for index in range(len(value)))
    return _Conversation(
        tuple(_message(item, where) for item, where in zip(value, places, strict=True)), places
    )


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise ExampleError(place, f"{_kind(value)}; expected a message: an object with role and content")
    if "role" not in value:
        raise ExampleError(f"{place}.role", f"missing; {_found_keys(value)}")
    role = value["role"]
    if role not in ROLES:
        raise ExampleError(f"{place}.role", f"{_kind(role)}; expected one of {', '.join(ROLES)}")
    has_calls = _has_tool_calls(value, place)
    return {**value, "content": _content(value, has_calls, f"{place}.content")}


def _has_tool_calls(message: Message, place: str) -> bool:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return False
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ExampleError(f"{place}.tool_calls", f"{_kind(calls)}; expected a list of objects")
    if message["role"] != "assistant":
        raise ExampleError(
            f"{place}.tool_calls", f"on a turn of role {message['role']}; only the assistant calls tools"
        )
    return True


def _content(message: Message, has_calls: bool, place: str) -> str:
    content = message.get("content")
    if content is None and has_calls:
        return ""
    if "content" not in message:
        raise ExampleError(place, f"missing; {_found_keys(message)}")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        expected = (
            "a string or a list of text parts"
            if content is not None
            else "a string (null only beside tool_calls)"
        )
        raise ExampleError(place, f"{_kind(content)}; expected {expected}")
    return "".join(_text_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _text_part(part: object, place: str) -> str:
    if not isinstance(part, dict) or "type" not in part:
        raise ExampleError(place, f'{_kind(part)}; expected a part like {{"type": "text", "text": "…"}}')
    if part["type"] != "text":
        raise ExampleError(f"{place}.type", f"{_kind(part['type'])}; only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise ExampleError(f"{place}.text", f"{_kind(part.get('text'))}; expected a string")
    return cast("str", part["text"])


def _tools(row: Row, *containers: tuple[str, Row]) -> Tools:
    """The tools of a row: its own or those of an object in it (`input.tools`); two lists must be the same."""
    holders = [("tools", row)] if row.get("tools") else []
    if any(holder.get("tools") for _, holder in containers):
        holders += [(f"{name}.tools", holder) for name, holder in containers]
    found = [(place, holder.get("tools") or []) for place, holder in holders]
    for place, tools in found:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ExampleError(place, f"{_kind(tools)}; expected a list of tools (objects)")
    for place, tools in found[1:]:
        if not _same(tools, found[0][1]):
            raise ExampleError(
                place, f"other tools than in {found[0][0]}: the two sides have different prompts"
            )
    return tuple(found[0][1]) if found else None


def _chat_example(chosen: _Conversation, rejected: _Conversation, tools: Tools, line: int) -> ChatExample:
    """Split two whole conversations where they stop being the same, which must be at an assistant turn."""
    for side in (chosen, rejected):
        _expect_role(side, len(side.messages) - 1, "the last turn")
    shared = _shared_length(chosen.messages, rejected.messages)
    shorter = min(len(chosen.messages), len(rejected.messages))
    if shared == len(chosen.messages) == len(rejected.messages):
        raise ExampleError(
            rejected.places[-1], "chosen and rejected are identical: there is nothing to prefer"
        )
    # Where one side is the start of the other, its last turn is the response: a response is never empty.
    start = min(shared, shorter - 1)
    _refuse_different_prompts(chosen, rejected, start)
    if start == 0:
        raise ExampleError(rejected.places[0], "no prompt: both sides start with an assistant turn")
    if not any(message["content"].strip() for message in chosen.messages[:start]):
        raise ExampleError(f"{chosen.places[start - 1]}.content", "the prompt is empty; nothing is asked")
    for side in (chosen, rejected):
        _refuse_empty_turns(side, start)
    prompt = chosen.messages[:start]
    return ChatExample(prompt, chosen.messages[start:], rejected.messages[start:], tools, line)


def _shared_length(one: Messages, other: Messages) -> int:
    """Number of messages that are the same at the start of both."""
    shared = 0
    while shared < min(len(one), len(other)) and _same(one[shared], other[shared]):
        shared += 1
    return shared


def _refuse_different_prompts(chosen: _Conversation, rejected: _Conversation, start: int) -> None:
    """Both sides must go on with the assistant, and from there be asked the same things."""
    for one, other in ((rejected, chosen), (chosen, rejected)):
        role = one.messages[start]["role"]
        if role != "assistant":
            _refuse_turns((one.places[start], one.messages[start]), other.messages[start])
    asked = [
        [
            (place, turn)
            for place, turn in zip(side.places, side.messages, strict=True)
            if turn["role"] in ASKING_ROLES
        ]
        for side in (chosen, rejected)
    ]
    for (_, one_turn), (place, other_turn) in zip(*asked, strict=False):
        if not _same(one_turn, other_turn):
            _refuse_turns((place, other_turn), one_turn)
    if len(asked[0]) != len(asked[1]):
        place, turn = max(asked, key=len)[min(len(turns) for turns in asked)]
        raise ExampleError(place, f"different prompts: this {turn['role']} turn is on one side only")


def _refuse_turns(here: tuple[str, Message], there: Message) -> NoReturn:
    place, turn = here
    if turn["role"] != there["role"]:
        reason = f"a turn of role {turn['role']} here, of role {there['role']} on the other side"
    elif turn["content"] != there["content"]:
        at = _first_difference(turn["content"], there["content"])
        here_text, there_text = _excerpt(turn["content"], at), _excerpt(there["content"], at)
        reason = f"from character {at} on {here_text} here, {there_text} on the other side"
    else:
        reason = f"the {turn['role']} turns have the same content but other fields"
    raise ExampleError(place, f"different prompts: {reason}")


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refuse_empty_turns(side: _Conversation, start: int) -> None:
    for place, turn in zip(side.places[start:], side.messages[start:], strict=True):
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise ExampleError(
                f"{place}.content", f"{_kind(turn['content'])}: an empty response cannot be learned from"
            )


def _expect_role(side: _Conversation, index: int, which: str) -> None:
    role = side.messages[index]["role"]
    if role != "assistant":
        raise ExampleError(f"{side.places[index]}.role", f"{which} is of role {role!r}; expected 'assistant'")


# --- formats ------------------------------------------------------------------------------------------------


def _read_messages(row: Row, line: int) -> ChatExample:
    sides = [_object_at(row, name) for name in ("chosen", "rejected")]
    chosen = _conversation(_at(sides[0], "messages", "chosen"), "chosen.messages")
    rejected = _conversation(_at(sides[1], "messages", "rejected"), "rejected.messages")
    tools = _tools(row, ("chosen", sides[0]), ("rejected", sides[1]))
    return _repeating_nothing_else(row, _chat_example(chosen, rejected, tools, line), "prompt", "system")


def _read_preferred_output(row: Row, line: int) -> ChatExample:
    given = _at(row, "input")
    holder = given if isinstance(given, dict) else {}
    if isinstance(given, str):
        prompt = _one_turn("user", given, "input")
    elif isinstance(given, dict):
        prompt = _conversation(_at(given, "messages", "input"), "input.messages")
    else:
        prompt = _conversation(given, "input")
    chosen, rejected = (_output(row, name) for name in ("preferred_output", "non_preferred_output"))
    return _chat_example(prompt + chosen, prompt + rejected, _tools(row, ("input", holder)), line)


def _output(row: Row, name: str) -> _Conversation:
    value = _at(row, name)
    return _one_turn("assistant", value, name) if isinstance(value, str) else _response(value, name)


def _one_turn(role: str, text: str, place: str) -> _Conversation:
    if not text.strip():
        raise ExampleError(place, f"{_kind(text)}; expected some text")
    return _Conversation(({"role": role, "content": text},), (place,))


def _response(value: object, place: str) -> _Conversation:
    response = _conversation(value, place)
    _expect_role(response, 0, "the first turn of a response (the prompt stands apart)")
    return response


def _read_prompt_messages(row: Row, line: int) -> ChatExample:
    prompt = _conversation(_at(row, "prompt"), "prompt")
    chosen, rejected = (_response(_at(row, name), name) for name in ("chosen", "rejected"))
    example = _chat_example(prompt + chosen, prompt + rejected, _tools(row), line)
    return _repeating_nothing_else(row, example, "system")


def _read_prompt_text(row: Row, line: int) -> PlainExample:
    prompt, chosen, rejected = (_text(_at(row, name), name) for name in ("prompt", "chosen", "rejected"))
    _refuse_what_text_leaves_out(row)
    if chosen == rejected:
        raise ExampleError("rejected", "chosen and rejected are identical: there is nothing to prefer")
    return PlainExample(prompt, chosen, rejected, line)


def _read_message_lists(row: Row, line: int) -> ChatExample:
    chosen, rejected = (_conversation(_at(row, name), name) for name in ("chosen", "rejected"))
    return _repeating_nothing_else(
        row, _chat_example(chosen, rejected, _tools(row), line), "prompt", "system"
    )


def _read_text(row: Row, line: int) -> TextExample:
    chosen, rejected = (_whole_text(_at(row, name), name) for name in ("chosen", "rejected"))
    _refuse_what_text_leaves_out(row)
    return _text_example(chosen, rejected, "rejected", line)


def _read_samples(row: Row, line: int) -> PreferenceExample:
    samples = row["samples"]
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ExampleError("samples", f"{_kind(samples)}; expected a list of two objects")
    if len(samples) != 2:
        later = "; ranked lists come later" if len(samples) > 2 else ""
        raise ExampleError("samples", f"{len(samples)} samples; expected exactly two{later}")
    scores = [_score(sample, f"samples[{index}]") for index, sample in enumerate(samples)]
    if scores[0] == scores[1]:
        raise ExampleError("samples[1].score", f"a tie: both samples have the score {scores[0]:g}")
    best, worst = (0, 1) if scores[0] > scores[1] else (1, 0)
    forms = {_form(sample) for sample in samples}
    if forms == {"an object with messages"}:
        chosen, rejected = (
            _conversation(samples[index]["messages"], f"samples[{index}].messages") for index in (best, worst)
        )
        tools = _tools(row, *((f"samples[{index}]", sample) for index, sample in enumerate(samples)))
        return _chat_example(chosen, rejected, tools, line)
    if forms == {"text"}:
        chosen_text, rejected_text = (
            _whole_text(samples[index], f"samples[{index}]") for index in (best, worst)
        )
        return _text_example(chosen_text, rejected_text, f"samples[{worst}]", line)
    raise ExampleError("samples", f"{' and '.join(sorted(forms))}; expected messages in both or text in both")


def _score(sample: Row, place: str) -> float:
    evals = sample.get("evals")
    nested = evals.get("score") if isinstance(evals, dict) else None
    score = sample.get("score", nested)
    if score is None:
        raise ExampleError(f"{place}.score", f"missing; {_found_keys(sample)}; expected score or evals.score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ExampleError(f"{place}.score", f"{_kind(score)}; expected a finite number")
    if nested is not None and nested != score:
        raise ExampleError(f"{place}.score", f"{_kind(score)}, but evals.score is {_kind(nested)}; keep one")
    return float(score)


def _text_example(chosen: str, rejected: str, place: str, line: int) -> TextExample:
    if chosen == rejected:
        raise ExampleError(place, "chosen and rejected are identical: there is nothing to prefer")
    return TextExample(chosen, rejected, line)


def _whole_text(value: object, place: str) -> str:
    return (
        _text(_at(value, "text", place), f"{place}.text") if isinstance(value, dict) else _text(value, place)
    )


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ExampleError(place, f"{_kind(value)}; expected some text")
    return value


def _repeating_nothing_else(row: Row, example: ChatExample, *keys: str) -> ChatExample:
    """Public data sets repeat a turn of the conversation beside it; anything else there would get lost."""
    for key in keys:
        beside = row.get(key)
        if beside and not isinstance(beside, str):
            raise ExampleError(key, f"{_kind(beside)} beside whole conversations; put it into them")
        if beside and beside.strip() not in [message["content"].strip() for message in example.prompt]:
            raise ExampleError(key, f"{_kind(beside)} is no turn of the conversations; put it into them")
    return example


def _refuse_what_text_leaves_out(row: Row) -> None:
    for key in PROMPT_LIKE_KEYS:
        if row.get(key) and row[key] != row.get("prompt"):
            raise ExampleError(
                key, "not used beside plain texts; put it into `prompt`, or write all three as messages"
            )
    if row.get("tools"):
        raise ExampleError("tools", "not used beside plain texts; write the conversation as messages")


@dataclass(frozen=True)
class _Format:
    """One accepted form. `claims` looks at keys and outer types only, `read` says what is wrong inside."""

    name: str
    shape: str
    claims: Callable[[Row], bool]
    read: Callable[[Row, int], PreferenceExample]


def _sides(row: Row) -> set[str]:
    return {_form(row[name]) for name in ("chosen", "rejected") if name in row}


def _form(value: object) -> str:
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


def _has_side(row: Row, form: str) -> bool:
    return form in _sides(row)


FORMATS = (
    _Format(
        "messages",
        '{"chosen": {"messages": […]}, "rejected": {"messages": […]}}',
        lambda row: _has_side(row, "an object with messages"),
        _read_messages,
    ),
    _Format(
        "preferred_output",
        '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}',
        lambda row: "preferred_output" in row or "non_preferred_output" in row,
        _read_preferred_output,
    ),
    _Format(
        "prompt-messages",
        '{"prompt": [messages], "chosen": [messages], "rejected": [messages]}',
        lambda row: isinstance(row.get("prompt"), list) and bool(_sides(row)),
        _read_prompt_messages,
    ),
    _Format(
        "prompt-text",
        '{"prompt": "…", "chosen": "…", "rejected": "…"}',
        lambda row: isinstance(row.get("prompt"), str) and _has_side(row, "text"),
        _read_prompt_text,
    ),
    _Format(
        "message-lists",
        '{"chosen": [messages], "rejected": [messages]}',
        lambda row: _has_side(row, "a list") and not isinstance(row.get("prompt"), list),
        _read_message_lists,
    ),
    _Format(
        "text",
        '{"chosen": {"text": "…"}, "rejected": {"text": "…"}}',
        lambda row: _has_side(row, "text") and row.get("prompt") is None,
        _read_text,
    ),
    _Format(
        "samples",
        '{"samples": [{"messages": […], "score": 1.0}, {"messages": […], "score": 0.0}]}',
        lambda row: "samples" in row,
        _read_samples,
    ),
)


def _format_of(row: Row) -> _Format:
    """The one format that this row is meant to be. Raises ExampleError if there is none, or more than one."""
    if len(_sides(row)) == 2:
        raise ExampleError(
            "rejected",
            f"{_form(row['rejected'])}, while chosen is {_form(row['chosen'])}; both must have the same form",
        )
    claiming = [form for form in FORMATS if form.claims(row)]
    if len(claiming) == 1:
        return claiming[0]
    if claiming:
        fits = " and ".join(f"{form.name} {form.shape}" for form in claiming)
        raise ExampleError("row", f"fits {len(claiming)} formats: {fits}; keep the keys of one")
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is not None and not isinstance(row[name], str | list):
            raise ExampleError(name, f"{_kind(row[name])}; accepted are {ACCEPTED}")
    raise ExampleError("row", f"{_found_keys(row)}; accepted are {ACCEPTED}")


def _shapes() -> str:
    return " | ".join(form.shape for form in FORMATS)


# --- what errors show ---------------------------------------------------------------------------------------


def _at(holder: Row, key: str, place: str = "") -> Any:
    if key not in holder:
        raise ExampleError(_under(place, key), f"missing; {_found_keys(holder)}")
    return holder[key]


def _object_at(row: Row, key: str) -> Row:
    value = _at(row, key)
    if not isinstance(value, dict):
        raise ExampleError(key, f"{_kind(value)}; expected an object with messages")
    return value


def _under(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _same(one: object, other: object) -> bool:
    """Equal as JSON: Python alone takes true for 1."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _kind(value: object) -> str:
    """A value for an error message: its kind, and so much of it as tells it from others."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {_excerpt(value)}" if value else "an empty string"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"an object ({_found_keys(cast('Row', value))})"


def _found_keys(holder: Row) -> str:
    keys = ", ".join(islice(holder, 12)) + (", …" if len(holder) > 12 else "")
    return f"the keys here are {keys}" if holder else "there are no keys here"


def _excerpt(text: str, start: int = 0, length: int = 40) -> str:
    shown = json.dumps(text[start : start + length], ensure_ascii=False)
    return shown if len(text) <= start + length else f'{shown[:-1]}…"'
