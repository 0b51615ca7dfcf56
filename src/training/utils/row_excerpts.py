"""What rows of a data file say, read back by their lines and cut to what a person looks at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from firesteel.sdk.errors import DataError
from training.utils.jsonl import hash_of_file, located_rows
from training.utils.preference_data import read_row
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    Messages,
    PlainExample,
    RankedExample,
    TextExample,
)
from training.utils.sft_data import read_sft_row
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample

LONGEST = 700
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class RowText:
    """A row as its labelled parts: prompt and answers, or as it stands where no reader knows it."""

    parts: Mapping[str, str]
    """Of a ranked list without its answers."""
    answers: Sequence[str] = ()
    """Of a ranked list, best first."""
    preferences: Sequence[tuple[int, int]] = ()
    """Of a ranked list, the better and the worse answer of each of its pairs, by place."""

    def pair(self, number: int) -> Mapping[str, str]:
        """The parts of one of its pairs, from 1; those of any other row."""
        if not 0 < number <= len(self.preferences):
            return self.parts
        sides = zip(("chosen", "rejected"), self.preferences[number - 1], strict=True)
        of = len(self.answers)
        return {
            **self.parts,
            **{f"{side}: answer {place + 1} of {of}": self.answers[place] for side, place in sides},
        }


def excerpt(text: str, longest: int = LONGEST) -> str:
    """Its start and end, with the number of characters left out between them."""
    if len(text) <= longest:
        return text
    start, end = longest * 2 // 3, longest // 3
    return f"{text[:start]} […{len(text) - start - end:,} characters…] {text[-end:]}"


def read_back(path: Path, sha256: str | None, lines: Collection[int]) -> Mapping[int, RowText] | str:
    """The rows of these lines, or why they cannot be had: the file is gone, or not the one with this hash."""
    try:
        if sha256 is None:
            return f"it is not recorded what {path} held"
        if hash_of_file(str(path))[0] != sha256:
            return f"{path} is not what it was when the run began"
        last = max(lines, default=0)
        found = {}
        for row in located_rows(str(path)):
            if row.line in lines:
                found[row.line] = _text_of(row.raw, row.line)
            if row.line >= last:
                break
        return found
    except DataError as error:
        return str(error)


def _text_of(raw: bytes, line: int) -> RowText:
    """A row is of one kind; which, only its reader says."""
    try:
        example = read_row(raw, line)[1]
        if isinstance(example, RankedExample):
            answers = [excerpt(_said_in(answer)) for answer in example.answers]
            return RowText({"prompt": excerpt(_said_in(example.prompt))}, answers, example.preferences)
        parts = _parts(example)
    except ExampleError:
        try:
            parts = _sft_parts(read_sft_row(raw, line)[1])
        except ExampleError:
            parts = {"row": raw.decode(errors="replace")}
    return RowText({name: excerpt(text) for name, text in parts.items()})


def _parts(example: ChatExample | PlainExample | TextExample) -> Mapping[str, str]:
    if isinstance(example, ChatExample):
        sides = example.prompt, example.chosen, example.rejected
        prompt, chosen, rejected = (_conversation(side) for side in sides)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    prompt = example.prompt if isinstance(example, PlainExample) else ""
    return {"prompt": prompt, "chosen": example.chosen, "rejected": example.rejected}


def _sft_parts(example: SftExample) -> Mapping[str, str]:
    if isinstance(example, DocumentExample):
        return {"text": example.text}
    if isinstance(example, CompletionExample):
        return {"prompt": example.prompt, "completion": example.completion}
    first = example.learned.index(True)
    asked, answered = example.messages[:first], example.messages[first:]
    return {"prompt": _conversation(asked), "answer": _conversation(answered)}


def _said_in(part: Messages | str) -> str:
    return part if isinstance(part, str) else _conversation(part)


def _conversation(messages: Messages) -> str:
    """One turn as its text; several with the role before each."""
    if len(messages) == 1:
        return _said(messages[0]["content"], messages[0].get("tool_calls"))
    turns = (f"{turn['role']}: {_said(turn['content'], turn.get('tool_calls'))}" for turn in messages)
    return "\n".join(turns)


def _said(content: str, calls: object) -> str:
    return f"{content}\n[tool calls: {calls}]" if calls else content
