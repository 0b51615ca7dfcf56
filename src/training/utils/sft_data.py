"""A row of supervised data says what it is, or exactly why not: `file:line: field: reason`.

One JSON object per line, UTF-8, as it is or gzipped. Every row of a file has the same one of these forms:

==========  ====================================================================================
messages    {"messages": […]}; the assistant's turns are learned
completion  {"prompt": [messages], "completion": [messages]}, or two strings: the completion is learned
alpaca      {"instruction": "…", "input": "…", "output": "…"}; with `system` and `history` [[asked, said], …]
sharegpt    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}; with `system`
text        {"text": "…"}; all of it is learned
==========  ====================================================================================

A message's own `weight` (0 or 1, as OpenAI has it; `train` or `loss` in other programs' files) says whether an
assistant's turn is learned; `weight` beside the messages how much the row counts (above 0). `tools` may stand beside
messages, and `source`, the name of where the row is from, in any form. Instruction and input of Alpaca's form are one
user message of two lines, as LLaMA-Factory has it. Of messages everything is kept, as in `preference_data`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from training.utils.conversations import (
    Conversation,
    one_turn,
    read_conversation,
    read_response,
    read_tools,
    refuse_what_messages_leave_out,
    without_weight,
)
from training.utils.jsonl import parse_row
from training.utils.plain_texts import read_text, refuse_what_text_leaves_out
from training.utils.preference_examples import ExampleError, Messages, Tools
from training.utils.row_forms import RowForm, claimed
from training.utils.row_values import (
    Row,
    keys_found,
    read_source,
    read_weight,
    refuse_unread,
    required,
    shown,
)
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample, TurnsExample

ACCEPTED = (
    "`messages`, `prompt` with `completion`, `instruction` with `output`, `conversations` (each with from and value), "
    "or `text`"
)
OF_PREFERENCES = {"chosen", "rejected", "preferred_output", "samples", "completions"}
WITH_ANSWERS = {"messages", "completion", "output", "text"}
# What may say something of a conversation: beside one that does not read it, it would be left out without a word.
BESIDE = (
    *("prompt", "completion", "system", "history", "instruction", "input", "output", "response", "text"),
    *("question", "query", "answer", "context", "functions", "function_call"),
)
DOCUMENT = "text"
TURN_FLAGS = ("weight", "train", "loss")
"""By these keys of a turn OpenAI, Axolotl and ms-swift say whether it is learned."""
MARKS = ("label", "kto_tag")
"""By these keys rows of KTO say whether an answer is a good one."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def read_sft_row(raw: bytes, line: int) -> tuple[str, SftExample]:
    """The form of one row and what it says. Raises ExampleError."""
    row = parse_row(raw)
    if row.keys() & OF_PREFERENCES and not row.keys() & WITH_ANSWERS:
        raise ExampleError(
            "row", f"{keys_found(row)}: a preference; `firesteel dpo` and `orpo` train on these"
        )
    form = claimed(row, FORMATS)
    if form is None:
        raise ExampleError("row", f"{keys_found(row)}; accepted are {ACCEPTED}")
    refuse_unread(row)
    _refuse_bad_answers(row)
    return form.name, replace(form.read(row, line), weight=read_weight(row), source=read_source(row))


def _read_messages(row: Row, line: int) -> TurnsExample:
    conversation = read_conversation(_with_weights(row["messages"], "messages"), "messages")
    _refuse_beside(row, conversation.messages, {"messages"})
    return _turns(conversation, 0, read_tools(row), line)


def _read_completion(row: Row, line: int) -> SftExample:
    prompt, completion = (required(row, name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        refuse_what_text_leaves_out(row)
        _refuse_beside(row, (), {"prompt", "completion"})
        return CompletionExample(read_text(prompt, "prompt"), read_text(completion, "completion"), line)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ExampleError(
            "completion",
            f"{shown(completion)}, while the prompt is {shown(prompt)}; give both as messages or as text",
        )
    asked = read_conversation(prompt, "prompt")
    whole = asked + read_response(_with_weights(completion, "completion"), "completion")
    _refuse_beside(row, whole.messages, {"prompt", "completion"})
    return _turns(whole, len(asked.messages), read_tools(row), line)


def _read_alpaca(row: Row, line: int) -> TurnsExample:
    _refuse_beside(row, (), {"instruction", "input", "output", "system", "history"}, "tools")
    turns: list[Conversation] = []
    if row.get("system"):
        turns.append(one_turn("system", read_text(row["system"], "system"), "system"))
    for index, exchange in enumerate(_history(row)):
        for role, text, part in zip(("user", "assistant"), exchange, (0, 1), strict=True):
            turns.append(one_turn(role, text, f"history[{index}][{part}]"))
    turns.append(one_turn("user", _instruction(row), "instruction"))
    turns.append(one_turn("assistant", read_text(required(row, "output"), "output"), "output"))
    return _turns(_joined(turns), 0, None, line)


def _instruction(row: Row) -> str:
    """Instruction and input, or whichever of them says something."""
    texts = []
    for name in ("instruction", "input"):
        text = required(row, name) if name == "instruction" else row.get(name) or ""
        if not isinstance(text, str):
            raise ExampleError(name, f"{shown(text)}; expected a string")
        texts += [text] if text.strip() else []
    return "\n".join(texts)


def _history(row: Row) -> list[list[str]]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ExampleError("history", f"{shown(history)}; expected a list of [asked, said]")
    for index, exchange in enumerate(history):
        if not (
            isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(t, str) for t in exchange)
        ):
            raise ExampleError(
                f"history[{index}]", f"{shown(exchange)}; expected a list of two strings: asked, said"
            )
    return history


def _read_sharegpt(row: Row, line: int) -> TurnsExample:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ExampleError("conversations", f"{shown(turns)}; expected a list of turns")
    messages = [_sharegpt_message(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    conversation = read_conversation(_with_weights(messages, "conversations"), "conversations")
    _refuse_beside(row, conversation.messages, {"conversations"} | ({"system"} - _roles(conversation)))
    if row.get("system") and "system" not in _roles(conversation):
        conversation = one_turn("system", read_text(row["system"], "system"), "system") + conversation
    return _turns(conversation, 0, read_tools(_with_parsed_tools(row)), line)


def _roles(conversation: Conversation) -> set[str]:
    return {message["role"] for message in conversation.messages}


def _sharegpt_message(turn: object, place: str) -> dict[str, Any]:
    """A turn of ShareGPT's as a message; `function_call` holds JSON with a name and arguments, or a list of these."""
    if not isinstance(turn, dict):
        raise ExampleError(place, f"{shown(turn)}; expected an object with from and value")
    if "role" in turn and "from" not in turn:
        return turn  # a message already
    role, value = required(turn, "from", place), required(turn, "value", place)
    others = {key: turn[key] for key in turn.keys() - {"from", "value"}}
    if role == "function_call":
        return {**others, "role": "assistant", "content": "", "tool_calls": _called(value, f"{place}.value")}
    if role not in SHAREGPT_ROLES:
        known = ", ".join((*SHAREGPT_ROLES, "function_call"))
        raise ExampleError(f"{place}.from", f"{shown(role)}; expected one of {known}")
    return {**others, "role": SHAREGPT_ROLES[role], "content": value}


def _called(value: object, place: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ExampleError(place, f"a function call that is not JSON: {error.msg}") from None
    calls = found if isinstance(found, list) and found else [found]
    for call in calls:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise ExampleError(place, f"{shown(call)}; expected a function call with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _with_weights(turns: object, place: str) -> object:
    """Messages whose `train` or `loss`, as other programs have it, is their `weight`; what is none is left as it is."""
    return (
        [_with_weight(turn, f"{place}[{i}]") for i, turn in enumerate(turns)]
        if isinstance(turns, list)
        else turns
    )


def _with_weight(turn: object, place: str) -> object:
    if not isinstance(turn, dict):
        return turn
    said = {name: turn[name] for name in TURN_FLAGS if turn.get(name) is not None}
    kept = {name: value for name, value in turn.items() if name not in TURN_FLAGS}
    for name, value in said.items():
        if isinstance(value, bool) or value in (0, 1):
            continue
        raise ExampleError(f"{place}.{name}", f"{shown(value)}; expected 0 or 1")
    if len({bool(value) for value in said.values()}) > 1:
        raise ExampleError(
            f"{place}.{next(iter(said))}", f"{' and '.join(said)} contradict each other; keep one"
        )
    if not said:
        return kept
    (name, value), *_ = said.items()
    if value and turn.get("role") != "assistant":
        told = f"{shown(value)} on a turn that is not the assistant's; only those are learned"
        raise ExampleError(f"{place}.{name}", told)
    return {**kept, "weight": int(value)}


def _with_parsed_tools(row: Row) -> Row:
    """ShareGPT files hold their tools as a string of JSON."""
    if not isinstance(row.get("tools"), str) or not row["tools"]:
        return row
    try:
        return {**row, "tools": json.loads(row["tools"])}
    except json.JSONDecodeError as error:
        raise ExampleError("tools", f"a string that is not JSON: {error.msg}") from None


def _read_text(row: Row, line: int) -> DocumentExample:
    _refuse_beside(row, (), {"text"}, "tools")
    return DocumentExample(read_text(row["text"], "text"), line)


def _turns(conversation: Conversation, learned_from: int, tools: Tools, line: int) -> TurnsExample:
    """The assistant's turns from a place on are learned, but for those of weight 0."""
    places, messages = conversation.places, conversation.messages
    learned = tuple(
        index >= learned_from and message["role"] == "assistant" and message.get("weight", 1) == 1
        for index, message in enumerate(messages)
    )
    if messages[-1]["role"] != "assistant":
        raise ExampleError(
            f"{places[-1]}.role", f"the last turn is of role {messages[-1]['role']!r}; expected 'assistant'"
        )
    for index, (place, message) in enumerate(zip(places, messages, strict=True)):
        says = message["content"].strip() or message.get("tool_calls") or message.get("function_call")
        if learned[index] and not says:
            raise ExampleError(
                f"{place}.content", f"{shown(message['content'])}: an empty turn cannot be learned"
            )
    if not any(learned):
        raise ExampleError(
            f"{places[-1]}.weight", "0 on every turn of the assistant: nothing is left to learn"
        )
    if learned[0]:
        raise ExampleError(
            places[0],
            "the first turn is the assistant's: nothing is asked; remove it, or give it the weight 0",
        )
    return TurnsExample(tuple(without_weight(message) for message in messages), learned, tools, line)


def _joined(turns: Sequence[Conversation]) -> Conversation:
    first, *others = turns
    for turn in others:
        first = first + turn
    return first


def _refuse_beside(row: Row, messages: Messages, read: set[str], *others: str) -> None:
    """Refuse what this form does not read, but for a text that is a turn of the conversation: some files repeat one."""
    refuse_what_messages_leave_out(row, messages, *(key for key in (*BESIDE, *others) if key not in read))


def _refuse_bad_answers(row: Row) -> None:
    for key in MARKS:
        if row.get(key) in (False, 0) and row.get(key) is not None:
            raise ExampleError(
                key, f"{shown(row[key])}: the answer is marked as a bad one, and would be learned"
            )


FORMATS: tuple[RowForm[SftExample], ...] = (
    RowForm("messages", '{"messages": […]}', lambda row: "messages" in row, _read_messages),
    RowForm(
        "completion",
        '{"prompt": …, "completion": …}, two strings or two lists of messages',
        lambda row: "completion" in row,
        _read_completion,
    ),
    RowForm(
        "alpaca",
        '{"instruction": "…", "input": "…", "output": "…"}',
        lambda row: "instruction" in row or "output" in row,
        _read_alpaca,
    ),
    RowForm(
        "sharegpt",
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        lambda row: "conversations" in row,
        _read_sharegpt,
    ),
    RowForm(
        DOCUMENT,
        '{"text": "…"}',
        lambda row: "text" in row and not row.keys() & {"messages", "completion", "output", "conversations"},
        _read_text,
    ),
)
