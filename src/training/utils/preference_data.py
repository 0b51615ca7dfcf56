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

`tools` (a list of function schemas) may stand beside messages; `weight` (a number above 0, 1 where there is none) says
in any form how much the row counts in the loss of its step. Of messages everything is kept, except that
a list of text parts becomes one string and null content (beside tool_calls) becomes "", which every template
can show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn

from firesteel.sdk.errors import ConfigError, DataError, RowError
from training.utils.conversations import (
    Conversation,
    one_turn,
    read_conversation,
    read_response,
    read_tools,
    refuse_what_messages_leave_out,
    split_conversations,
)
from training.utils.jsonl import located_rows, parse_row
from training.utils.plain_texts import (
    read_text,
    read_whole_text,
    refuse_same_texts,
    refuse_what_text_leaves_out,
)
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    PlainExample,
    PreferenceExample,
    TextExample,
)
from training.utils.row_values import Row, keys_found, refuse_unread, required, required_object, shown

OnBadRow = Literal["fail", "skip"]

ERRORS_SHOWN = 10
LINES_SHOWN = 3
ACCEPTED = (
    '`chosen` and `rejected` (each {"messages": […]}, {"text": "…"}, a list of messages or a string; with or '
    "without `prompt`), `input` with `preferred_output` and `non_preferred_output`, or `samples`"
)


@dataclass(frozen=True)
class PreferenceFile:
    """What a file holds: its good rows, and for each bad one where and why. `rows` counts both."""

    path: str
    format: str
    examples: tuple[PreferenceExample, ...]
    bad: tuple[RowError, ...]
    rows: int


@dataclass
class FormatTally:
    """Which formats the rows of a file have: for each, how many rows, and the lines of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    first_lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, line: int) -> None:
        """Count one row."""
        self.merge(FormatTally({name: 1}, {name: [line]}))

    def merge(self, later: FormatTally) -> None:
        """Count the rows that another tally has counted behind these."""
        for name, count in later.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
            lines = [*self.first_lines.get(name, []), *later.first_lines[name]]
            self.first_lines[name] = lines[:LINES_SHOWN]

    def only(self, path: str) -> str:
        """The one format of all rows. Raises DataError if there are several."""
        if len(self.counts) > 1:
            found = "; ".join(f"{name} in {self._lines_text(name)}" for name in self.counts)
            raise DataError(
                f"{path}: its rows are of {len(self.counts)} formats: {found}. Keep each in a file of its own."
            )
        (name,) = self.counts
        return name

    def _lines_text(self, name: str) -> str:
        lines, count = self.first_lines[name], self.counts[name]
        more = "" if count <= len(lines) else f" and {count - len(lines)} more"
        return f"line {lines[0]}" if count == 1 else f"lines {', '.join(map(str, lines))}{more}"


def read_row(raw: bytes, line: int) -> tuple[str, PreferenceExample]:
    """The format of one row and what it says. Raises ExampleError."""
    row = parse_row(raw)
    form = _format_of(row)
    refuse_unread(row)
    return form.name, replace(form.read(row, line), weight=_weight(row))


def read_preferences(path: str | Path, on_bad_row: OnBadRow = "fail") -> PreferenceFile:
    """Read and check every row of a JSONL file (`.gz` or not), all of them into memory.

    Bad rows are left out and listed (`"skip"`), or refused all at once (`"fail"`): a `RowError` where there
    is one, a `DataError` that lists the first ten where there are more. Either way raises DataError for a
    file that cannot be read, holds no usable row, or mixes formats. Recipes read by `row_index` instead.
    """
    if on_bad_row not in ("fail", "skip"):
        raise ConfigError(f"on_bad_row: {on_bad_row!r} is neither 'fail' nor 'skip'")
    location = str(path)
    examples: list[PreferenceExample] = []
    bad: list[RowError] = []
    formats = FormatTally()
    for row in located_rows(location):
        try:
            name, example = read_row(row.raw, row.line)
        except ExampleError as error:
            bad.append(error.at(location, row.line))
        else:
            examples.append(example)
            formats.add(name, row.line)
    name = formats.only(location) if examples else ""
    if on_bad_row == "fail":
        refuse_rows(location, bad, len(bad))
    if not examples:
        refuse_nothing_left(location, bad, len(bad))
    return PreferenceFile(location, name, tuple(examples), tuple(bad), len(examples) + len(bad))


def refuse_rows(path: str, first: Sequence[RowError], count: int) -> None:
    """Raise one error for the bad rows of one file, of which the first few are given; return if there are none."""
    if not count:
        return
    if count == 1:
        raise first[0]
    shown_rows = first[:ERRORS_SHOWN]
    more = "" if count <= len(shown_rows) else f"\n  and {count - len(shown_rows)} more"
    listed = "".join(f"\n  {error}" for error in shown_rows)
    raise DataError(
        f"{path}: {count} rows cannot be used:{listed}{more}\n"
        'Mend or remove them, or leave them out with on_bad_row="skip".'
    )


def refuse_nothing_left(path: str, first: Sequence[RowError], count: int) -> NoReturn:
    """Raise the error of a file without a usable row."""
    if not count:
        shapes = " | ".join(form.shape for form in FORMATS)
        raise DataError(f"{path}: the file is empty; expected one JSON object per line, as one of {shapes}")
    listed = "".join(f"\n  {error}" for error in first[:ERRORS_SHOWN])
    raise DataError(f"{path}: none of its {count} rows can be used:{listed}")


def _read_messages(row: Row, line: int) -> ChatExample:
    sides = [required_object(row, name) for name in ("chosen", "rejected")]
    chosen = read_conversation(required(sides[0], "messages", "chosen"), "chosen.messages")
    rejected = read_conversation(required(sides[1], "messages", "rejected"), "rejected.messages")
    tools = read_tools(row, ("chosen", sides[0]), ("rejected", sides[1]))
    example = split_conversations(chosen, rejected, tools, line)
    refuse_what_messages_leave_out(row, example, "prompt", "system")
    return example


def _read_preferred_output(row: Row, line: int) -> ChatExample:
    given = required(row, "input")
    holder = given if isinstance(given, dict) else {}
    if isinstance(given, str):
        prompt = one_turn("user", given, "input")
    elif isinstance(given, dict):
        prompt = read_conversation(required(given, "messages", "input"), "input.messages")
    else:
        prompt = read_conversation(given, "input")
    chosen, rejected = (_output(row, name) for name in ("preferred_output", "non_preferred_output"))
    return split_conversations(prompt + chosen, prompt + rejected, read_tools(row, ("input", holder)), line)


def _output(row: Row, name: str) -> Conversation:
    value = required(row, name)
    return one_turn("assistant", value, name) if isinstance(value, str) else read_response(value, name)


def _read_prompt_messages(row: Row, line: int) -> ChatExample:
    prompt = read_conversation(required(row, "prompt"), "prompt")
    chosen, rejected = (read_response(required(row, name), name) for name in ("chosen", "rejected"))
    example = split_conversations(prompt + chosen, prompt + rejected, read_tools(row), line)
    refuse_what_messages_leave_out(row, example, "system")
    return example


def _read_prompt_text(row: Row, line: int) -> PlainExample:
    prompt, chosen, rejected = (
        read_text(required(row, name), name) for name in ("prompt", "chosen", "rejected")
    )
    refuse_what_text_leaves_out(row)
    refuse_same_texts(chosen, rejected, "rejected")
    return PlainExample(prompt, chosen, rejected, line)


def _read_message_lists(row: Row, line: int) -> ChatExample:
    chosen, rejected = (read_conversation(required(row, name), name) for name in ("chosen", "rejected"))
    example = split_conversations(chosen, rejected, read_tools(row), line)
    refuse_what_messages_leave_out(row, example, "prompt", "system")
    return example


def _read_text(row: Row, line: int) -> TextExample:
    chosen, rejected = (read_whole_text(required(row, name), name) for name in ("chosen", "rejected"))
    refuse_what_text_leaves_out(row)
    refuse_same_texts(chosen, rejected, "rejected")
    return TextExample(chosen, rejected, line)


def _read_samples(row: Row, line: int) -> PreferenceExample:
    samples = row["samples"]
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ExampleError("samples", f"{shown(samples)}; expected a list of two objects")
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
            read_conversation(samples[index]["messages"], f"samples[{index}].messages")
            for index in (best, worst)
        )
        tools = read_tools(row, *((f"samples[{index}]", sample) for index, sample in enumerate(samples)))
        return split_conversations(chosen, rejected, tools, line)
    if forms == {"text"}:
        chosen_text, rejected_text = (
            read_whole_text(samples[index], f"samples[{index}]") for index in (best, worst)
        )
        refuse_same_texts(chosen_text, rejected_text, f"samples[{worst}]")
        return TextExample(chosen_text, rejected_text, line)
    raise ExampleError("samples", f"{' and '.join(sorted(forms))}; expected messages in both or text in both")


def _weight(row: Row) -> float:
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ExampleError("weight", f"{shown(weight)}; expected a number above 0")
    return float(weight)


def _score(sample: Row, place: str) -> float:
    evals = sample.get("evals")
    nested = evals.get("score") if isinstance(evals, dict) else None
    score = sample.get("score", nested)
    if score is None:
        raise ExampleError(f"{place}.score", f"missing; {keys_found(sample)}; expected score or evals.score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ExampleError(f"{place}.score", f"{shown(score)}; expected a finite number")
    if nested is not None and nested != score:
        raise ExampleError(f"{place}.score", f"{shown(score)}, but evals.score is {shown(nested)}; keep one")
    return float(score)


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


FORMATS = (
    _Format(
        "messages",
        '{"chosen": {"messages": […]}, "rejected": {"messages": […]}}',
        lambda row: "an object with messages" in _sides(row),
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
        lambda row: isinstance(row.get("prompt"), str) and "text" in _sides(row),
        _read_prompt_text,
    ),
    _Format(
        "message-lists",
        '{"chosen": [messages], "rejected": [messages]}',
        lambda row: "a list" in _sides(row) and not isinstance(row.get("prompt"), list),
        _read_message_lists,
    ),
    _Format(
        "text",
        '{"chosen": {"text": "…"}, "rejected": {"text": "…"}}',
        lambda row: "text" in _sides(row) and row.get("prompt") is None,
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
            raise ExampleError(name, f"{shown(row[name])}; accepted are {ACCEPTED}")
    raise ExampleError("row", f"{keys_found(row)}; accepted are {ACCEPTED}")
