"""A row of one form as a row of another, where nothing gets lost and nothing is added.

What a row says is read by the reader of its form and written in the other; the new row is read back, and must say the
same. Keys that no form reads (`id`, `source`, …) and a `weight` go along. Texts are not made into messages or messages
into texts: the chat template would then stand in one and not in the other.
"""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from firesteel.sdk.errors import ConfigError, RowError
from firesteel.sealed import storage_errors
from training.utils.data_check import kind_of
from training.utils.jsonl import LocatedRow, located_rows, parse_row
from training.utils.preference_data import read_row
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    PlainExample,
    PreferenceExample,
    RankedExample,
    TextExample,
    Tools,
)
from training.utils.preference_rows import PREFERENCES
from training.utils.row_check import RowKind
from training.utils.row_forms import ERRORS_SHOWN, refuse_nothing_left, refuse_rows
from training.utils.row_outcomes import OnBadRow
from training.utils.row_values import Row
from training.utils.sft_data import read_sft_row
from training.utils.sft_examples import CompletionExample, SftExample, TurnsExample
from training.utils.sft_rows import SFT

NewRow: TypeAlias = dict[str, Any]
# What readers of forms read; everything else in a row is only carried along.
_READ = frozenset(
    {
        "prompt",
        "chosen",
        "rejected",
        "input",
        "preferred_output",
        "non_preferred_output",
        "samples",
        "completions",
    }
    | {"scores", "ranks", "tools", "system", "weight"}
    | {"messages", "completion", "instruction", "output", "history", "conversations", "text"}
)
_OF_A_SIDE = frozenset({"messages", "text", "tools"})
_OF_AN_ANSWER = _OF_A_SIDE | {"score", "rank", "evals"}
# Where the scores of two answers go in forms that have no place for them, by the name that public data sets use.
_CHOSEN_SCORE, _REJECTED_SCORE = "score_chosen", "score_rejected"


@dataclass(frozen=True)
class Conversion:
    """How many rows were converted, and which could not be."""

    rows: int
    refused: tuple[RowError, ...]
    """The first few."""
    refused_count: int


def convert_file(
    path: str, form: str, out: Path | None, on_bad_row: OnBadRow, say: Callable[[str], None]
) -> Conversion:
    """Write all rows in another form to `out`, which is there whole or not at all, or `say` each.

    With `"fail"` rows that cannot be converted are refused all at once, at the end.
    """
    kind = kind_of([path])
    forms = _SFT_WRITERS if kind is SFT else {**_WRITERS, **_RANKED_WRITERS}
    if form not in forms:
        raise ConfigError(f"--to {form}: rows of this kind are written as {', '.join(forms)}")
    if out is None:
        done = _convert_rows(path, form, kind, say)
        if on_bad_row == "fail":
            refuse_rows(path, done.refused, done.refused_count)
        return done
    partial = out.with_name(f".partial-{secrets.token_hex(4)}-{out.name}")
    try:
        with storage_errors(out, 0), _opened(partial) as file:
            done = _convert_rows(path, form, kind, lambda line: print(line, file=file))
        if on_bad_row == "fail":
            refuse_rows(path, done.refused, done.refused_count)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return done


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="utf-8")
    return path.open("w", encoding="utf-8")


def _convert_rows(path: str, form: str, kind: RowKind[Any], say: Callable[[str], None]) -> Conversion:
    rows, refused = 0, 0
    first: list[RowError] = []
    for row in located_rows(path):
        try:
            say(json.dumps(convert(row, form, kind), ensure_ascii=False))
            rows += 1
        except ExampleError as error:
            refused += 1
            first += [error.at(path, row.line)] if refused <= ERRORS_SHOWN else []
    if not rows:
        refuse_nothing_left(path, first, refused, kind.shapes)
    return Conversion(rows, tuple(first), refused)


def convert(row: LocatedRow, form: str, kind: RowKind[Any] = PREFERENCES) -> NewRow:
    """The same row in another form. Raises ExampleError for one that is unusable, or cannot be said in that form."""
    old = parse_row(row.raw)
    _refuse_lost_keys(old)
    if kind is SFT:
        new = _SFT_WRITERS[form](read_sft_row(row.raw, row.line)[1])
    else:
        new = _of_preference(old, read_row(row.raw, row.line)[1], form)
    new |= {key: value for key, value in old.items() if key not in _READ and key not in _told_in(new)}
    new |= {"weight": old["weight"]} if "weight" in old else {}
    _refuse_another_meaning(row, LocatedRow(row.line, 0, json.dumps(new).encode()), form, kind)
    return new


def _of_preference(old: Row, example: PreferenceExample, form: str) -> NewRow:
    scores = _scores(old, example)
    if form in _RANKED_WRITERS:
        ranked = example if isinstance(example, RankedExample) else _as_list(example, scores)
        return _RANKED_WRITERS[form](ranked)
    return _WRITERS[form](_as_pair(example)) | scores


def _told_in(new: NewRow) -> set[str]:
    """Keys that a ranked row says in its answers."""
    return {_CHOSEN_SCORE, _REJECTED_SCORE} if new.keys() & {"samples", "completions"} else set()


def _scores(row: Row, example: PreferenceExample) -> dict[str, float]:
    """Of two answers, where the row has any."""
    if isinstance(example, RankedExample):
        return {_CHOSEN_SCORE: -example.ranks[0], _REJECTED_SCORE: -example.ranks[-1]}
    if "samples" not in row:
        scores = {key: row[key] for key in (_CHOSEN_SCORE, _REJECTED_SCORE) if key in row}
        return scores if len(scores) == 2 else {}
    worse, better = sorted(
        sample["score"] if "score" in sample else sample["evals"]["score"] for sample in row["samples"]
    )
    return {_CHOSEN_SCORE: better, _REJECTED_SCORE: worse}


def _as_list(example: ChatExample | PlainExample | TextExample, scores: Mapping[str, float]) -> RankedExample:
    """Two answers as a list; a whole text stands as an answer after an empty one."""
    better, worse = scores.get(_CHOSEN_SCORE, 1.0), scores.get(_REJECTED_SCORE, 0.0)
    if better <= worse:
        raise ExampleError(_CHOSEN_SCORE, f"{better:g}, and that of the rejected side is {worse:g}")
    prompt = "" if isinstance(example, TextExample) else example.prompt
    tools = example.tools if isinstance(example, ChatExample) else None
    return RankedExample(prompt, (example.chosen, example.rejected), (-better, -worse), tools, example.line)


def _as_pair(example: PreferenceExample) -> ChatExample | PlainExample | TextExample:
    if not isinstance(example, RankedExample):
        return example
    if len(example.answers) > 2:
        raise ExampleError("row", f"ranks {len(example.answers)} answers, and that form holds two")
    chosen, rejected = example.answers
    if isinstance(example.prompt, str):
        return PlainExample(example.prompt, str(chosen), str(rejected), example.line)
    turns = [() if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return ChatExample(example.prompt, turns[0], turns[1], example.tools, example.line)


def _refuse_lost_keys(row: Row) -> None:
    """What stands inside a side, beside its messages or text, has no place in other forms."""
    sides = [(name, row[name], _OF_A_SIDE) for name in ("chosen", "rejected", "input") if name in row]
    for name in ("samples", "completions"):
        answers = row.get(name)
        for index, answer in enumerate(answers if isinstance(answers, list) else []):
            sides.append((f"{name}[{index}]", answer, _OF_AN_ANSWER))
            if isinstance(answer, dict):
                sides.append((f"{name}[{index}].evals", answer.get("evals"), frozenset({"score"})))
    for name, side, known in sides:
        lost = [key for key in side if key not in known] if isinstance(side, dict) else []
        if lost:
            raise ExampleError(
                f"{name}.{lost[0]}", "has no place in another form; remove it, or put it beside the two sides"
            )


def _refuse_another_meaning(old: LocatedRow, new: LocatedRow, form: str, kind: RowKind[Any]) -> None:
    """Read back, the new row must say what the old one does."""
    try:
        name, again = _read(new, kind)
    except ExampleError as error:
        raise ExampleError(error.field, f"as {form}: {error.reason}") from None
    if name != form or again != _read(old, kind)[1]:
        raise ExampleError("row", f"as {form} it would say something else")


def _read(row: LocatedRow, kind: RowKind[Any]) -> tuple[str, object]:
    """The form of a row and its meaning, which is the same in all forms."""
    if kind is SFT:
        form, example = read_sft_row(row.raw, row.line)
        if isinstance(example, TurnsExample):
            example = replace(example, learned=tuple(map(bool, example.learned)))
        return form, example
    form, preference = read_row(row.raw, row.line)
    if isinstance(preference, RankedExample) and len(preference.answers) == 2:
        preference = replace(_as_pair(preference), weight=preference.weight, source=preference.source)
    return form, preference


def _chat(example: PreferenceExample) -> ChatExample:
    if not isinstance(example, ChatExample):
        raise ExampleError(
            "row", "holds texts, and that form messages: a chat template would be added to them"
        )
    return example


def _with_tools(row: NewRow, example: ChatExample) -> NewRow:
    return row | _tools(example.tools)


def _as_messages(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    chosen, rejected = ({"messages": [*chat.prompt, *side]} for side in (chat.chosen, chat.rejected))
    return _with_tools({"chosen": chosen, "rejected": rejected}, chat)


def _as_preferred_output(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    given = _with_tools({"messages": list(chat.prompt)}, chat)
    return {
        "input": given,
        "preferred_output": list(chat.chosen),
        "non_preferred_output": list(chat.rejected),
    }


def _as_prompt_messages(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    row = {"prompt": list(chat.prompt), "chosen": list(chat.chosen), "rejected": list(chat.rejected)}
    return _with_tools(row, chat)


def _as_message_lists(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    chosen, rejected = ([*chat.prompt, *side] for side in (chat.chosen, chat.rejected))
    return _with_tools({"chosen": chosen, "rejected": rejected}, chat)


def _as_prompt_text(example: PreferenceExample) -> NewRow:
    if not isinstance(example, PlainExample):
        raise ExampleError("row", "has no prompt that is a text by itself, as that form has")
    return {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}


def _as_text(example: PreferenceExample) -> NewRow:
    if not isinstance(example, TextExample):
        raise ExampleError("row", "is not two whole texts, as that form is")
    return {"chosen": {"text": example.chosen}, "rejected": {"text": example.rejected}}


def _as_samples(example: RankedExample) -> NewRow:
    samples: list[NewRow] = []
    for answer, rank in zip(example.answers, example.ranks, strict=True):
        if not isinstance(answer, str) and not isinstance(example.prompt, str):
            samples.append({"messages": [*example.prompt, *answer], "score": -rank})
        elif example.prompt == "":
            samples.append({"text": answer, "score": -rank})
        else:
            raise ExampleError("row", "has its prompt apart, and samples of texts have none")
    return {"samples": samples} | _tools(example.tools)


def _as_completions(example: RankedExample) -> NewRow:
    if example.prompt == "":
        raise ExampleError("row", "is two whole texts, and completions have their prompt apart")
    prompt = example.prompt if isinstance(example.prompt, str) else list(example.prompt)
    completions = [
        {"text": answer, "score": -rank}
        if isinstance(answer, str)
        else {"messages": list(answer), "score": -rank}
        for answer, rank in zip(example.answers, example.ranks, strict=True)
    ]
    return {"prompt": prompt, "completions": completions} | _tools(example.tools)


def _turns(example: SftExample) -> TurnsExample:
    if not isinstance(example, TurnsExample):
        raise ExampleError(
            "row", "holds texts, and that form messages: a chat template would be added to them"
        )
    return example


def _as_sft_messages(example: SftExample) -> NewRow:
    turns = _turns(example)
    messages = [
        {**message, "weight": 0} if message["role"] == "assistant" and not learned else message
        for message, learned in zip(turns.messages, turns.learned, strict=True)
    ]
    return {"messages": messages} | _tools(turns.tools)


def _as_completion(example: SftExample) -> NewRow:
    if isinstance(example, CompletionExample):
        return {"prompt": example.prompt, "completion": example.completion}
    turns = _turns(example)
    first = turns.learned.index(True)
    messages = _as_sft_messages(turns)["messages"]
    return {"prompt": messages[:first], "completion": messages[first:]} | _tools(turns.tools)


def _as_sharegpt(example: SftExample) -> NewRow:
    turns = _turns(example)
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    conversation = []
    for message, learned in zip(turns.messages, turns.learned, strict=True):
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        if message["role"] not in names:
            raise ExampleError("row", f"has a turn of role {message['role']}, which that form does not name")
        turn = {"from": names[message["role"]], "value": message["content"], **others}
        conversation.append(turn | ({"weight": 0} if message["role"] == "assistant" and not learned else {}))
    return {"conversations": conversation} | _tools(turns.tools)


def _tools(tools: Tools) -> NewRow:
    return {"tools": list(tools)} if tools else {}


_WRITERS: dict[str, Callable[[PreferenceExample], NewRow]] = {
    "messages": _as_messages,
    "preferred_output": _as_preferred_output,
    "prompt-messages": _as_prompt_messages,
    "message-lists": _as_message_lists,
    "prompt-text": _as_prompt_text,
    "text": _as_text,
}
_RANKED_WRITERS: dict[str, Callable[[RankedExample], NewRow]] = {
    "samples": _as_samples,
    "completions": _as_completions,
}
_SFT_WRITERS: dict[str, Callable[[SftExample], NewRow]] = {
    "messages": _as_sft_messages,
    "completion": _as_completion,
    "sharegpt": _as_sharegpt,
}
