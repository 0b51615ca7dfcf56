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
completions        {"prompt": …, "completions": [{"text": "…", "score": 1.0}, {"text": "…", "score": 0.0}]}
=================  =============================================================================

The last two are ranked lists where they have more than two answers, see `ranked_rows`.

`tools` (a list of function schemas) may stand beside messages; `weight` (a number above 0, 1 where there is none) says
in any form how much the row counts in the loss of its step, and `source` (a string, or null) names where it is from:
held-out pairs have metrics of each source. Of messages everything is kept, except that a list of text parts becomes one
string and null content (beside tool_calls) becomes "", which every template can show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from firesteel.sdk.errors import ConfigError, RowError
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
from training.utils.ranked_rows import read_completions, read_samples
from training.utils.row_forms import FormatTally, RowForm, claimed, refuse_nothing_left, refuse_rows
from training.utils.row_outcomes import OnBadRow
from training.utils.row_values import (
    Row,
    keys_found,
    outer_form,
    read_source,
    read_weight,
    refuse_unread,
    required,
    required_object,
    shown,
)

ACCEPTED = (
    '`chosen` and `rejected` (each {"messages": […]}, {"text": "…"}, a list of messages or a string; with or '
    "without `prompt`), `input` with `preferred_output` and `non_preferred_output`, `samples`, or `prompt` with "
    "`completions`"
)
OF_SFT = {"messages", "conversations", "completion", "output"}


@dataclass(frozen=True)
class PreferenceFile:
    """What a file holds: its good rows, and for each bad one where and why. `rows` counts both."""

    path: str
    format: str
    examples: tuple[PreferenceExample, ...]
    bad: tuple[RowError, ...]
    rows: int


def read_row(raw: bytes, line: int) -> tuple[str, PreferenceExample]:
    """The format of one row and what it says. Raises ExampleError."""
    row = parse_row(raw)
    form = _form_of(row)
    refuse_unread(row)
    return form.name, replace(form.read(row, line), weight=read_weight(row), source=read_source(row))


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
        refuse_nothing_left(location, bad, len(bad), [form.shape for form in FORMATS])
    return PreferenceFile(location, name, tuple(examples), tuple(bad), len(examples) + len(bad))


def _read_messages(row: Row, line: int) -> ChatExample:
    sides = [required_object(row, name) for name in ("chosen", "rejected")]
    chosen = read_conversation(required(sides[0], "messages", "chosen"), "chosen.messages")
    rejected = read_conversation(required(sides[1], "messages", "rejected"), "rejected.messages")
    tools = read_tools(row, ("chosen", sides[0]), ("rejected", sides[1]))
    example = split_conversations(chosen, rejected, tools, line)
    refuse_what_messages_leave_out(row, example.prompt, "prompt", "system")
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
    refuse_what_messages_leave_out(row, example.prompt, "system")
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
    refuse_what_messages_leave_out(row, example.prompt, "prompt", "system")
    return example


def _read_text(row: Row, line: int) -> TextExample:
    chosen, rejected = (read_whole_text(required(row, name), name) for name in ("chosen", "rejected"))
    refuse_what_text_leaves_out(row)
    refuse_same_texts(chosen, rejected, "rejected")
    return TextExample(chosen, rejected, line)


def _sides(row: Row) -> set[str]:
    return {outer_form(row[name]) for name in ("chosen", "rejected") if name in row}


FORMATS: tuple[RowForm[PreferenceExample], ...] = (
    RowForm(
        "messages",
        '{"chosen": {"messages": […]}, "rejected": {"messages": […]}}',
        lambda row: "an object with messages" in _sides(row),
        _read_messages,
    ),
    RowForm(
        "preferred_output",
        '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}',
        lambda row: "preferred_output" in row or "non_preferred_output" in row,
        _read_preferred_output,
    ),
    RowForm(
        "prompt-messages",
        '{"prompt": [messages], "chosen": [messages], "rejected": [messages]}',
        lambda row: isinstance(row.get("prompt"), list) and bool(_sides(row)),
        _read_prompt_messages,
    ),
    RowForm(
        "prompt-text",
        '{"prompt": "…", "chosen": "…", "rejected": "…"}',
        lambda row: isinstance(row.get("prompt"), str) and "text" in _sides(row),
        _read_prompt_text,
    ),
    RowForm(
        "message-lists",
        '{"chosen": [messages], "rejected": [messages]}',
        lambda row: "a list" in _sides(row) and not isinstance(row.get("prompt"), list),
        _read_message_lists,
    ),
    RowForm(
        "text",
        '{"chosen": {"text": "…"}, "rejected": {"text": "…"}}',
        lambda row: "text" in _sides(row) and row.get("prompt") is None,
        _read_text,
    ),
    RowForm(
        "samples",
        '{"samples": [{"messages": […], "score": 1.0}, {"messages": […], "score": 0.0}]}',
        lambda row: "samples" in row,
        read_samples,
    ),
    RowForm(
        "completions",
        '{"prompt": … , "completions": [{"text": "…", "score": 1.0}, …]}, or each with messages, or a rank',
        lambda row: "completions" in row,
        read_completions,
    ),
)


def _form_of(row: Row) -> RowForm[PreferenceExample]:
    """The one form that this row is meant to be. Raises ExampleError if there is none, or more than one."""
    if len(_sides(row)) == 2:
        raise ExampleError(
            "rejected",
            f"{outer_form(row['rejected'])}, while chosen is {outer_form(row['chosen'])}; "
            "both must have the same form",
        )
    if form := claimed(row, FORMATS):
        return form
    for name in ("prompt", "chosen", "rejected"):
        if row.get(name) is not None and not isinstance(row[name], str | list):
            raise ExampleError(name, f"{shown(row[name])}; accepted are {ACCEPTED}")
    if row.keys() & OF_SFT:
        raise ExampleError("row", f"{keys_found(row)}: a supervised row; `firesteel sft` trains on these")
    raise ExampleError("row", f"{keys_found(row)}; accepted are {ACCEPTED}")
