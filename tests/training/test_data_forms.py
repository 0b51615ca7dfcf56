"""Conversion between forms: there and back the tokens are the same, and what would be lost is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHATML_WITH_TOOLS, byte_tokenizer

from firesteel.sdk.errors import ConfigError, DataError, RowError
from training.utils.data_check import kind_of
from training.utils.data_forms import convert_file
from training.utils.jsonl import located_rows
from training.utils.rendering import Renderer

USER = {"role": "user", "content": "2+2? é 😀"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}
RESULT = {"role": "tool", "content": "4", "name": "add"}
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("4", "5"))
TOOLS = [{"type": "function", "function": {"name": "add"}}]
MESSAGES = {
    "chosen": {"messages": [USER, CALL, RESULT, FOUR]},
    "rejected": {"messages": [USER, FIVE]},
    "tools": TOOLS,
    "weight": 2.5,
    "id": "row 1",
    "source": "web",
}
PLAIN = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
TEXTS = {"chosen": {"text": "2+2=4"}, "rejected": {"text": "2+2=5"}}
SCORED = {
    "samples": [{"messages": [USER, FIVE], "score": 2}, {"messages": [USER, FOUR], "evals": {"score": 9.5}}]
}
RANKED = {"source": "web", "prompt": [USER], "completions": ["4", "5", "6"], "ranks": [1, 3, 3]}
TURNS = {"messages": [USER, {**FIVE, "weight": 0}, USER, FOUR]}
OF_MESSAGES = ["messages", "preferred_output", "prompt-messages", "message-lists", "samples", "completions"]
SAID = [
    *((MESSAGES, "messages", form) for form in OF_MESSAGES),
    *((SCORED, "samples", form) for form in OF_MESSAGES),
    (PLAIN, "prompt-text", "completions"),
    (TEXTS, "text", "samples"),
    (RANKED, "completions", "samples"),
    (TURNS, "messages", "completion"),
    (TURNS, "messages", "sharegpt"),
]


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokens(path: str) -> list[tuple[Any, ...]]:
    renderer = Renderer(byte_tokenizer(CHATML_WITH_TOOLS))
    rendered = [kind_of([path]).render(row, renderer) for row in located_rows(path)]
    return [
        tuple((side.tokens, side.mask.tolist()) for side in row.answers.sides.values()) for row in rendered
    ]


def form(path: str) -> str:
    renderer = Renderer(byte_tokenizer(CHATML_WITH_TOOLS))
    return kind_of([path]).render(next(located_rows(path)), renderer).form


@pytest.mark.parametrize(
    ("row", "here", "there"), SAID, ids=[f"{here} to {there}" for _, here, there in SAID]
)
def test_there_and_back_the_tokens_are_the_same(tmp_path: Path, row: Any, here: str, there: str) -> None:
    path = write(tmp_path, row)
    other, again = tmp_path / "other.jsonl", tmp_path / "again.jsonl.gz"
    assert form(path) == here
    assert convert_file(path, there, other, "fail", print).rows == 1
    assert form(str(other)) == there
    convert_file(str(other), here, again, "fail", print)
    assert tokens(path) == tokens(str(other)) == tokens(str(again))
    kept = {"id", "weight", "source"} & row.keys()
    assert {key: json.loads(other.read_text())[key] for key in kept} == {key: row[key] for key in kept}


def test_scores_survive_forms_without_a_place_for_them(tmp_path: Path) -> None:
    path, other, again = write(tmp_path, SCORED), tmp_path / "other.jsonl", tmp_path / "again.jsonl"
    convert_file(path, "messages", other, "fail", print)
    assert json.loads(other.read_text()) | {"chosen": 0, "rejected": 0} == {
        "chosen": 0,
        "rejected": 0,
        "score_chosen": 9.5,
        "score_rejected": 2,
    }
    convert_file(str(other), "samples", again, "fail", print)
    (row,) = map(json.loads, again.read_text().splitlines())
    assert [sample["score"] for sample in row["samples"]] == [9.5, 2]
    assert row.keys() == {"samples"}


@pytest.mark.parametrize(
    ("row", "to", "reason"),
    [
        (
            PLAIN,
            "messages",
            "row: holds texts, and that form messages: a chat template would be added to them",
        ),
        (MESSAGES, "prompt-text", "row: has no prompt that is a text by itself"),
        (TEXTS, "completions", "row: is two whole texts, and completions have their prompt apart"),
        (PLAIN, "samples", "row: has its prompt apart, and samples of texts have none"),
        (RANKED, "messages", "row: ranks 3 answers, and that form holds two"),
        (
            {**MESSAGES, "chosen": {**MESSAGES["chosen"], "source": "x"}},
            "samples",
            "chosen.source: has no place in",
        ),
        (
            {**MESSAGES, "score_chosen": 1, "score_rejected": 2},
            "samples",
            "score_chosen: 1, and that of the rejected",
        ),
        ({"text": "all of it"}, "messages", "row: holds texts, and that form messages"),
        ({**PLAIN, "chosen": ""}, "text", "chosen: an empty string; expected some text"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_said_in_a_form_is_refused_by_line(
    tmp_path: Path, row: Any, to: str, reason: str
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError) as refused:
        convert_file(write(tmp_path, row), to, out, "fail", print)
    assert f"rows.jsonl:1: {reason}" in str(refused.value)
    assert not out.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path, out = write(tmp_path, MESSAGES, {"chosen": 1}, MESSAGES), tmp_path / "out.jsonl"
    with pytest.raises(RowError):
        convert_file(path, "samples", out, "fail", print)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    done = convert_file(path, "samples", out, "skip", print)
    assert (done.rows, done.refused_count, done.refused[0].line) == (2, 1, 2)
    assert len(out.read_text().splitlines()) == 2


def test_an_unknown_form_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--to parquet: rows of this kind are written as messages, preferred_out"
    ):
        convert_file(write(tmp_path, MESSAGES), "parquet", None, "fail", print)
