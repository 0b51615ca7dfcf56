"""Damaged files of every kind, and what `firesteel data check` says of each: the line, the place and the reason."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import byte_tokenizer
from typer.testing import CliRunner

from firesteel.cli.main import app
from firesteel.sdk.errors import DataError
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
GOOD = {"chosen": {"messages": [USER, FOUR]}, "rejected": {"messages": [USER, FIVE]}}
PLAIN = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
SAMPLES = [{"messages": [USER, FOUR], "score": 1}, {"messages": [USER, FIVE], "score": 0}]


def line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def good(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"{number}+2?"}
    return {"chosen": {"messages": [question, FOUR]}, "rejected": {"messages": [question, FIVE]}}


def around(row: Any) -> bytes:
    """A file in which this is line 2."""
    return b"\n".join((line(good(1)), line(row), line(good(3)))) + b"\n"


def sides(chosen: Any, rejected: Any, **fields: Any) -> dict[str, Any]:
    return {"chosen": {"messages": chosen}, "rejected": {"messages": rejected}, **fields}


def asking(message: Any) -> dict[str, Any]:
    """A row whose prompt is this message."""
    return sides([message, FOUR], [message, FIVE])


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pairs.jsonl", content)
    return file.getvalue()


FILE = b"".join(line(good(number)) + b"\n" for number in range(20))
TEXT = FILE.decode()
CALL = [{"type": "function", "function": {"name": "add", "arguments": {}}}]

# name → line 2 of a file, and what is said of it
ROWS: dict[str, tuple[Any, str]] = {
    # JSON
    "cut off in the middle": (line(GOOD)[:-20], "row: not valid JSON at column 187: Expecting ',' delimiter"),
    "a comma too much": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c",}',
        "row: not valid JSON at column 48",
    ),
    "single quotes": (b"{'prompt': 'a'}", "row: not valid JSON at column 2: Expecting property name"),
    "a key without quotes": (b'{prompt: "a"}', "row: not valid JSON at column 2"),
    "two objects in a line": (line(GOOD) + line(GOOD), "row: not valid JSON at column 207: Extra data"),
    "a comment": (b"// the second row", "row: not valid JSON at column 1: Expecting value"),
    "bare words": (b"hello world", "row: not valid JSON at column 1"),
    "a log line before it": (b"2024-01-01 INFO " + line(GOOD), "row: not valid JSON at column 5"),
    "Python's True": (b'{"chosen": True}', "row: not valid JSON at column 12"),
    "a text without its end": (b'{"prompt": "a', "row: not valid JSON at column 12: Unterminated string"),
    "a raw control character": (b'{"prompt": "a\x01"}', "row: not valid JSON at column 14: Invalid control"),
    "a wrong escape": (b'{"prompt": "a\\x"}', "row: not valid JSON at column 14: Invalid \\escape"),
    "a number": (5, "row: the number 5; expected an object"),
    "null": (None, "row: null; expected an object"),
    "a text": ("row", 'row: the string "row"; expected an object'),
    "a list": ([GOOD], "row: a list of 1; expected an object"),
    "an empty object": ({}, "row: there are no keys here"),
    "NaN": (b'{"samples": [{"score": NaN}]}', "samples[0].score: NaN is not JSON"),
    "infinity": (line(GOOD)[:-1] + b', "weight": Infinity}', "weight: Infinity is not JSON"),
    "a number of 5000 digits": (
        b'{"weight": ' + b"9" * 5000 + b"}",
        "row: not usable as JSON: Exceeds the limit",
    ),
    "nested a hundred thousand deep": (b'{"a":' * 100_000, "row: nested too deeply to be read"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "prompt: the key 'prompt' is there twice"),
    "a key twice inside": (
        b'{"chosen": {"messages": [{"role": "user", "role": "user"}]}}',
        "chosen.messages[0].role: the key 'role' is there twice",
    ),
    "a line of more than 50 MB": (
        b'{"prompt": "' + b"a" * 50_000_001 + b'"}',
        "row: more than 50,000,000 bytes in one line",
    ),
    # Characters
    "NUL bytes": (b'{"prompt": "a\x00"}', "row: not valid JSON at column 14: Invalid control character"),
    "an escaped NUL": ({**PLAIN, "chosen": "a\0b"}, "chosen: a NUL character at position 1"),
    "half an emoji": (
        b'{"prompt": "\\ud83d"}',
        "prompt: half a character (\\ud83d, a lone surrogate) at position 0",
    ),
    "half an emoji as a key": (b'{"\\ud83d": 1}', "half a character"),
    "a byte order mark in the middle": (
        b"\xef\xbb\xbf" + line(GOOD),
        "row: a byte order mark in the middle of",
    ),
    "a byte of Latin-1": (
        '{"prompt": "café"}'.encode("latin-1"),
        "row: not UTF-8: byte 0xe9 at byte 16 of the line",
    ),
    "a surrogate as bytes": (b'{"prompt": "\xed\xa0\x80"}', "row: not UTF-8: byte 0xed at byte 13"),
    "a row in UTF-16": (json.dumps(PLAIN).encode("utf-16-le"), "row: not valid JSON at column 2"),
    # The sides
    "no keys that are known": (
        {"question": "a", "answer": "b"},
        "row: the keys here are question, answer; accepted",
    ),
    "chosen missing": ({"rejected": GOOD["rejected"]}, "chosen: missing; the keys here are rejected"),
    "rejected missing": ({"chosen": GOOD["chosen"]}, "rejected: missing; the keys here are chosen"),
    "chosen a number": ({**GOOD, "chosen": 5}, "rejected: an object with messages, while chosen is no text"),
    "both sides numbers": ({"chosen": 1, "rejected": 2}, "chosen: the number 1; accepted are"),
    "chosen null": ({**PLAIN, "chosen": None}, "rejected: text, while chosen is null"),
    "sides of two forms": (
        {"chosen": [USER, FOUR], "rejected": "5"},
        "rejected: text, while chosen is a list; both must have the same form",
    ),
    "two forms at once": (GOOD | {"samples": SAMPLES}, "row: fits 2 formats: messages"),
    "a side without messages": (
        {"chosen": {"turns": []}, "rejected": {"turns": []}},
        "chosen: an object (the keys",
    ),
    "the same on both sides": (
        sides([USER, FOUR], [USER, FOUR]),
        "rejected.messages[1]: chosen and rejected are ident",
    ),
    "the same texts": ({**PLAIN, "rejected": "4"}, "rejected: chosen and rejected are identical"),
    "different prompts": (
        sides([USER, FOUR], [{"role": "user", "content": "2+3?"}, FIVE]),
        'rejected.messages[0]: different prompts: from character 2 on "3?" here, "2?" on the other side',
    ),
    "no prompt": (
        sides([FOUR], [FIVE]),
        "rejected.messages[0]: no prompt: both sides start with an assistant turn",
    ),
    "an empty prompt": (
        asking({"role": "user", "content": " "}),
        "chosen.messages[0].content: the prompt is empty",
    ),
    "an empty answer": (
        sides([USER, FOUR], [USER, {"role": "assistant", "content": ""}]),
        "rejected.messages[1].content: an empty string: an empty response cannot be learned from",
    ),
    "an answer of blanks": (
        sides([USER, {"role": "assistant", "content": " \n"}], [USER, FIVE]),
        'chosen.messages[1].content: the string " \\n": an empty response',
    ),
    "an empty text": ({**PLAIN, "chosen": ""}, "chosen: an empty string; expected some text"),
    "the last turn is the user's": (
        sides([USER, FOUR, USER], [USER, FIVE]),
        "chosen.messages[2].role: the last turn is of role 'user'; expected 'assistant'",
    ),
    "an instruction beside texts": (
        {"instruction": "add", "chosen": "4", "rejected": "5"},
        "instruction: not used beside plain texts",
    ),
    "lists of texts": (
        {"prompt": "a", "chosen": ["4"], "rejected": ["5"]},
        'chosen[0]: the string "4"; expected a mess',
    ),
    # Messages
    "messages a text": (
        sides("hello", [USER, FIVE]),
        'chosen.messages: the string "hello"; expected a list of',
    ),
    "messages an object": (
        sides({"0": USER}, [USER, FIVE]),
        "chosen.messages: an object (the keys here are 0)",
    ),
    "messages null": (sides(None, [USER, FIVE]), "chosen.messages: null; expected a list of messages"),
    "no messages": (sides([], [USER, FIVE]), "chosen.messages: an empty list; expected at least one message"),
    "a message that is a text": (
        sides(["2+2?", FOUR], [USER, FIVE]),
        'chosen.messages[0]: the string "2+2?"; expected',
    ),
    "a message that is null": (
        sides([None, FOUR], [USER, FIVE]),
        "chosen.messages[0]: null; expected a message",
    ),
    "no role": (asking({"content": "a"}), "chosen.messages[0].role: missing; the keys here are content"),
    "a role that is unknown": (
        asking({"role": "human", "content": "a"}),
        'chosen.messages[0].role: the string "human"',
    ),
    "a role in capitals": (
        asking({"role": "User", "content": "a"}),
        "expected one of system, developer, user",
    ),
    "a role that is a number": (asking({"role": 1, "content": "a"}), "chosen.messages[0].role: the number 1"),
    "a role that is a list": (
        asking({"role": ["user"], "content": "a"}),
        "chosen.messages[0].role: a list of 1",
    ),
    "no content": (asking({"role": "user"}), "chosen.messages[0].content: missing; the keys here are role"),
    "content null": (
        asking({"role": "user", "content": None}),
        "content: null; expected a string (null only beside",
    ),
    "content a number": (
        asking({"role": "user", "content": 5}),
        "chosen.messages[0].content: the number 5; expected",
    ),
    "content an object": (
        asking({"role": "user", "content": {"text": "a"}}),
        "content: an object (the keys here are",
    ),
    "a part that is an image": (
        asking({"role": "user", "content": [{"type": "image_url", "image_url": "…"}]}),
        'chosen.messages[0].content[0].type: the string "image_url"; only text parts',
    ),
    "a part without a type": (
        asking({"role": "user", "content": [{"text": "a"}]}),
        "chosen.messages[0].content[0]: an object (the keys here are text); expected a part like",
    ),
    "a part whose text is a number": (
        asking({"role": "user", "content": [{"type": "text", "text": 1}]}),
        "chosen.messages[0].content[0].text: the number 1; expected a string",
    ),
    "tool calls of the user": (
        asking({"role": "user", "content": "a", "tool_calls": CALL}),
        "chosen.messages[0].tool_calls: on a turn of role user; only the assistant calls tools",
    ),
    "tool calls a text": (
        sides([USER, {**FOUR, "tool_calls": "add"}], [USER, FIVE]),
        'chosen.messages[1].tool_calls: the string "add"; expected a list of objects',
    ),
    "tools a text": ({**GOOD, "tools": "add"}, 'tools: the string "add"; expected a list of tools'),
    "tools of texts": ({**GOOD, "tools": ["add"]}, "tools: a list of 1; expected a list of tools (objects)"),
    "other tools on one side": (
        {
            "chosen": {"messages": [USER, FOUR], "tools": CALL},
            "rejected": {"messages": [USER, FIVE], "tools": []},
        },
        "rejected.tools: other tools than in chosen.tools: the two sides have different prompts",
    ),
    "tools beside texts": ({**PLAIN, "tools": CALL}, "tools: not used beside plain texts"),
    "images": ({**GOOD, "images": ["a.png"]}, "images: a list of 1; only text can be trained on"),
    "audio in a message": (asking({**USER, "audio": {"id": 1}}), "chosen.messages[0].audio: an object"),
    "documents": (
        {**GOOD, "documents": [{"text": "a"}]},
        "documents: a list of 1; documents are not rendered",
    ),
    "settings of the template": (
        {**GOOD, "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs: an object (the keys here are enable_thinking); the chat template is run as it",
    ),
    # Weights, scores
    "a weight of 0": ({**GOOD, "weight": 0}, "weight: the number 0; expected a number above 0"),
    "a weight below 0": ({**GOOD, "weight": -1}, "weight: the number -1; expected a number above 0"),
    "a weight that is a text": ({**GOOD, "weight": "1"}, 'weight: the string "1"; expected a number above 0'),
    "a weight that is true": ({**GOOD, "weight": True}, "weight: true; expected a number above 0"),
    "a turn's weight of 2": (
        sides([USER, {**FOUR, "weight": 2}], [USER, FIVE]),
        "messages[1].weight: the number 2",
    ),
    "an answer's weight of 0": (
        sides([USER, {**FOUR, "weight": 0}], [USER, FIVE]),
        "chosen.messages[1].weight: 0 on a turn of the response",
    ),
    "a source that is a number": ({**GOOD, "source": 5}, "source: the number 5; expected a string"),
    "one sample": ({"samples": SAMPLES[:1]}, "samples: a list of 1; expected 2 to 64 answers"),
    "samples an object": (
        {"samples": {"a": 1}},
        "samples: an object (the keys here are a); expected a list of ob",
    ),
    "samples that are texts": (
        {"samples": ["a", "b"]},
        "samples: a list of 2; expected a list of objects",
    ),
    "a tie": (
        {"samples": [SAMPLES[0], {**SAMPLES[1], "score": 1}]},
        "samples[1].score: a tie: both answers are equally good",
    ),
    "no score": (
        {"samples": [SAMPLES[0], {"messages": [USER, FIVE]}]},
        "samples[1].score: missing; the keys here",
    ),
    "a score that is a text": (
        {"samples": [SAMPLES[0], {**SAMPLES[1], "score": "0"}]},
        "samples[1].score: the string",
    ),
    "a score too large": (
        b'{"samples": [{"text": "a", "score": 1e999}, {"text": "b", "score": 0}]}',
        "samples[0].score: the number inf; expected a finite number",
    ),
    "an answer that starts with the user": (
        {"input": [USER], "preferred_output": [USER, FOUR], "non_preferred_output": [FIVE]},
        "preferred_output[0].role: the first turn of a response (the prompt stands apart) is of role 'user'",
    ),
    "one output only": (
        {"input": [USER], "preferred_output": [FOUR]},
        "non_preferred_output: missing; the keys here",
    ),
    "input a number": (
        {"input": 5, "preferred_output": "4", "non_preferred_output": "5"},
        "input: the number 5; expected a list of messages",
    ),
}

# name → a file as it is on the disk, and what is said of the whole of it
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty; expected one JSON object per line"),
    "blank lines only": (b"\n  \n\t\n\r\n", "the file is empty"),
    "a byte order mark only": (b"\xef\xbb\xbf", "the file is empty"),
    "UTF-16 of Windows": (TEXT.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "UTF-16, big end first": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "the file is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "the file is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark, big end first": (TEXT.encode("utf-16-be"), "the file is UTF-16"),
    "UTF-32": (TEXT.encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
    "lines that end with CR alone": (FILE.replace(b"\n", b"\r"), "lines end with CR alone; save it with LF"),
    "one JSON array": (
        json.dumps([GOOD]).encode(),
        "the file is one JSON array; expected one object per line",
    ),
    "a JSON array over lines": (json.dumps([GOOD], indent=2).encode(), "the file is one JSON array"),
    "an object over lines": (json.dumps(GOOD, indent=2).encode(), "its first object goes over several lines"),
    "Parquet": (
        b"PAR1\x15\x04\x15\x10" + bytes(40) + b"PAR1",
        "the file is Parquet; write its rows as JSON Lines",
    ),
    "Arrow": (b"ARROW1\0\0" + bytes(40), "the file is Arrow; write its rows as JSON Lines"),
    "SQLite": (b"SQLite format 3\0" + bytes(40), "the file is an SQLite database"),
    "ZIP": (zipped(FILE), "the file is a ZIP archive; unpack it first"),
    "bzip2": (bz2.compress(FILE), "the file is packed with bzip2; unpack it, or pack it with gzip"),
    "xz": (lzma.compress(FILE), "the file is packed with xz; unpack it, or pack it with gzip"),
    "Zstandard": (
        b"\x28\xb5\x2f\xfd" + bytes(40),
        "the file is packed with zstd; unpack it, or pack it with gzip",
    ),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "the file is a PDF"),
    "HTML": (
        b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
        "the file is a web page: was the download refused?",
    ),
    "CSV": (
        b"prompt,chosen,rejected\n2+2?,4,5\n",
        "the file looks like CSV; write each row as one JSON object",
    ),
    "CSV with semicolons": (b'"prompt";"chosen";"rejected"\n"2+2?";"4";"5"\n', "the file looks like CSV"),
    "TSV": (b"prompt\tchosen\trejected\n2+2?\t4\t5\n", "the file looks like CSV"),
    "YAML": (b"- prompt: 2+2?\n  chosen: 4\n", "the file looks like YAML; write each row as one JSON object"),
    "YAML with a start": (b"---\n- prompt: 2+2?\n", "the file looks like YAML"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "the file is a Git LFS pointer, not the data: run `git lfs pull`",
    ),
    "gzip, cut off": (gzip.compress(FILE)[:-20], "cannot be read: Compressed file ended before"),
    "gzip, broken inside": (
        gzip.compress(FILE)[:15] + b"\xff\xff\xff" + gzip.compress(FILE)[18:],
        "cannot be read: Error -3 while decompressing",
    ),
    "gzip with a wrong checksum": (gzip.compress(FILE)[:-8] + bytes(8), "cannot be read: CRC check failed"),
    "gzip of nothing": (gzip.compress(b""), "the file is empty"),
    "gzip of Parquet": (gzip.compress(b"PAR1" + bytes(40)), "the file is Parquet"),
    "gzip twice": (gzip.compress(gzip.compress(FILE)), "the file is packed with gzip twice"),
    "two forms": (
        line(good(1)) + b"\n" + line(PLAIN) + b"\n" + line(good(2)) + b"\n",
        "its rows are of 2 formats: messages in lines 1, 3; prompt-text in line 2",
    ),
}

INTACT: dict[str, bytes] = {
    "as it is": FILE,
    "line ends of Windows": FILE.replace(b"\n", b"\r\n"),
    "a byte order mark": b"\xef\xbb\xbf" + FILE,
    "no line end at its end": FILE.rstrip(b"\n"),
    "blank lines between": FILE.replace(b"\n", b"\n\n  \n"),
    "gzip": gzip.compress(FILE),
    "gzip with line ends of Windows and a byte order mark": gzip.compress(
        b"\xef\xbb\xbf" + FILE.replace(b"\n", b"\r\n")
    ),
    "gzip in two parts": gzip.compress(FILE[: len(FILE) // 2]) + gzip.compress(FILE[len(FILE) // 2 :]),
    "letters of every plane, raw": TEXT.replace("+2?", "+2? é 語 😀 \u2028").encode(),
}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(byte_tokenizer())


def checked(path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report; an error that gets out, as a bug's would, is raised."""
    result = CliRunner().invoke(
        app, ["data", "check", str(path), "--json", *arguments], catch_exceptions=False
    )
    return result.exit_code, json.loads(result.stdout)["files"][0]


def test_the_corpus_is_large() -> None:
    assert len(ROWS) + len(FILES) >= 130


@pytest.mark.parametrize("name", ROWS)
def test_a_damaged_row_is_told_by_its_line_and_reason_and_stops_a_run(
    name: str, tmp_path: Path, renderer: Renderer
) -> None:
    row, reason = ROWS[name]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(around(row))
    code, report = checked(path)
    assert code == 2
    assert [lost["line"] for lost in report["listed"]] == [2]
    assert reason in report["listed"][0]["reason"]
    assert (report["rows"], report["usable"]) == (3, 2)
    with pytest.raises(DataError) as refused:  # what a run begins with
        index_rows(str(path), renderer, PREFERENCES)
    assert str(refused.value) == f"{path}:2: {report['listed'][0]['reason']}"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told_as_a_whole_and_stops_a_run(
    name: str, tmp_path: Path, renderer: Renderer
) -> None:
    content, reason = FILES[name]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    code, report = checked(path)
    assert code == 2
    (error,) = (finding for finding in report["findings"] if finding["level"] == "error")
    assert error["text"].startswith(f"{path}: ")
    assert reason in error["text"]
    with pytest.raises(DataError) as refused:
        index_rows(str(path), renderer, PREFERENCES)
    assert str(refused.value) == error["text"]


def test_a_file_without_a_usable_row_is_told_by_its_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join(line({"question": index}) + b"\n" for index in range(30)))
    code, report = checked(path)
    assert code == 2
    (error,) = report["findings"]
    assert error["text"].startswith(
        f"{path}: none of its 30 rows can be used:\n  {path}:1: row: the keys here are qu"
    )
    assert len(error["text"].splitlines()) == 11


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.jsonl", "there is no such file"),
    "a folder": (lambda folder: folder, "cannot be read: [Errno 21] Is a directory"),
    "below a file": (
        lambda folder: folder / "pairs.jsonl/more",
        "cannot be read: [Errno 20] Not a directory",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    place, reason = PLACES[name]
    (tmp_path / "pairs.jsonl").write_bytes(FILE)
    code, report = checked(place(tmp_path))
    assert code == 2
    assert report["findings"][0]["text"].startswith(f"{place(tmp_path)}: {reason}")


@pytest.mark.parametrize("name", INTACT)
def test_a_file_that_only_looks_damaged_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(INTACT[name])
    code, report = checked(path)
    assert code == 0
    assert (report["rows"], report["usable"], report["lost"]) == (20, 20, 0)
