import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from firesteel.sdk.errors import ConfigError, DataError, RowError
from training.utils import jsonl, preference_data
from training.utils.preference_data import FORMATS, read_preferences, read_row
from training.utils.preference_examples import ChatExample, ExampleError, PlainExample, TextExample

USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
GOOD = {"chosen": {"messages": [USER, FOUR]}, "rejected": {"messages": [USER, FIVE]}}


def write(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> Path:
    """One line per row; bytes and strings as they are, anything else as JSON."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path = folder / name
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def sides(chosen: Any, rejected: Any, **fields: Any) -> dict[str, Any]:
    return {"chosen": {"messages": chosen}, "rejected": {"messages": rejected}, **fields}


# Every accepted form

SAME_CONVERSATION = {
    "messages": GOOD,
    "preferred_output": {
        "input": {"messages": [USER]},
        "preferred_output": [FOUR],
        "non_preferred_output": [FIVE],
    },
    "preferred_output with a list": {
        "input": [USER],
        "preferred_output": [FOUR],
        "non_preferred_output": [FIVE],
    },
    "preferred_output with strings": {"input": "2+2?", "preferred_output": "4", "non_preferred_output": "5"},
    "prompt-messages": {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
    "message-lists": {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    "samples": {"samples": [{"messages": [USER, FIVE], "score": 0}, {"messages": [USER, FOUR], "score": 1}]},
    "samples with evals": {
        "samples": [
            {"messages": [USER, FOUR], "evals": {"score": -1.5}},
            {"messages": [USER, FIVE], "evals": {"score": -2.5}},
        ]
    },
    "messages of text parts": sides(
        [user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]), FOUR], [USER, FIVE]
    ),
    "message-lists with the question repeated": {
        "prompt": "2+2?",
        "chosen": [USER, FOUR],
        "rejected": [USER, FIVE],
    },
}


@pytest.mark.parametrize("name", SAME_CONVERSATION)
def test_every_form_of_one_conversation_gives_the_same_example(tmp_path: Path, name: str) -> None:
    file = read_preferences(write(tmp_path, SAME_CONVERSATION[name]))

    assert file.examples == (ChatExample((USER,), (FOUR,), (FIVE,), None, line=1),)
    assert file.format == name.split(" ")[0]
    assert (file.rows, file.bad) == (1, ())


def test_plain_strings_with_a_prompt_stay_plain(tmp_path: Path) -> None:
    file = read_preferences(write(tmp_path, {"prompt": "2+2=", "chosen": "4", "rejected": "5"}))

    assert file.format == "prompt-text"
    assert file.examples == (PlainExample("2+2=", "4", "5", line=1),)


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("text", {"chosen": {"text": "2+2=4"}, "rejected": {"text": "2+2=5"}}),
        ("text", {"chosen": "2+2=4", "rejected": "2+2=5"}),
        ("samples", {"samples": [{"text": "2+2=5", "score": 0.1}, {"text": "2+2=4", "score": 0.9}]}),
    ],
)
def test_whole_texts_stay_whole(tmp_path: Path, form: str, row: Any) -> None:
    file = read_preferences(write(tmp_path, row))

    assert file.format == form
    assert file.examples == (TextExample("2+2=4", "2+2=5", line=1),)


def test_the_formats_and_their_shapes_stand_in_the_module_docstring() -> None:
    assert all(form.name in str(preference_data.__doc__) for form in FORMATS)


def test_the_prompt_is_all_that_both_sides_share_before_an_assistant_turn(tmp_path: Path) -> None:
    shared = [{"role": "system", "content": "Be brief."}, USER, FOUR, user("Sure?")]
    row = sides([*shared, assistant("Yes.")], [*shared, assistant("No.")])

    (example,) = read_preferences(write(tmp_path, row)).examples

    assert example == ChatExample(tuple(shared), (assistant("Yes."),), (assistant("No."),), None, line=1)


def test_where_one_side_is_the_start_of_the_other_its_last_turn_is_the_response(tmp_path: Path) -> None:
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": {}}}])
    result = {"role": "tool", "content": "4"}
    row = sides([USER, call], [USER, call, result, assistant("It is 4.")])

    (example,) = read_preferences(write(tmp_path, row)).examples

    assert isinstance(example, ChatExample)
    assert example.prompt == (USER,)
    assert example.chosen == (call,)
    assert example.rejected == (call, result, assistant("It is 4."))


def test_later_user_turns_may_follow_if_they_are_the_same(tmp_path: Path) -> None:
    row = sides(
        [USER, FOUR, user("Thanks"), assistant("Bye")], [USER, FIVE, user("Thanks"), assistant("Ciao")]
    )

    (example,) = read_preferences(write(tmp_path, row)).examples

    assert isinstance(example, ChatExample)
    assert example.chosen == (FOUR, user("Thanks"), assistant("Bye"))


@pytest.mark.parametrize("place", ["row", "input", "both"])
def test_tools_and_all_fields_of_messages_are_kept(tmp_path: Path, place: str) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    calls = [{"id": "1", "function": {"name": "add", "arguments": {"a": 2}}}]
    prompt = [user("2+2?", name="ann")]
    row = {
        "input": {"messages": prompt} | ({"tools": tools} if place != "row" else {}),
        "preferred_output": [assistant(None, tool_calls=calls, reasoning_content="Use the tool.")],
        "non_preferred_output": [assistant("5", tool_calls=None)],
    } | ({"tools": tools} if place != "input" else {})

    (example,) = read_preferences(write(tmp_path, row)).examples

    assert isinstance(example, ChatExample)
    assert example.tools == tuple(tools)
    assert example.prompt == tuple(prompt)
    assert example.chosen == (assistant("", tool_calls=calls, reasoning_content="Use the tool."),)


def test_metadata_beside_the_conversation_is_ignored(tmp_path: Path) -> None:
    row = GOOD | {"id": 7, "score_chosen": 9.5, "question": "2+2?"}
    assert len(read_preferences(write(tmp_path, row)).examples) == 1


# Every bad row: where, and why

PLAIN = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
OUTPUTS = {"preferred_output": [FOUR], "non_preferred_output": [FIVE]}
IMAGE = {"type": "image_url", "image_url": {"url": "cat.png"}}

# (what is wrong, the row, the field it is reported at, what the reason says)
BAD_ROWS: list[tuple[str, Any, str, str]] = [
    ("cut JSON", '{"chosen": {"messages": [', "row", "not valid JSON at column 26"),
    ("single quotes", "{'chosen': 1}", "row", "not valid JSON at column 2"),
    ("two objects in a line", "{} {}", "row", "not valid JSON at column 4: Extra data"),
    ("Latin-1", '{"prompt": "é"}'.encode("latin-1"), "row", "not UTF-8: byte 0xe9 at byte 13"),
    ("a number", "17", "row", "the number 17; expected an object"),
    ("a list", json.dumps([USER]), "row", "a list of 1; expected an object"),
    ("null", "null", "row", "null; expected an object"),
    (
        "a key twice",
        '{"prompt": "a", "prompt": "b", "chosen": "4", "rejected": "5"}',
        "prompt",
        "'prompt' is there twice",
    ),
    (
        "a key twice, deep inside",
        '{"chosen": {"messages": [{"role": "user", "role": "system"}]}, "rejected": 1}',
        "chosen.messages[0].role",
        "there twice",
    ),
    (
        "NaN",
        '{"samples": [{"text": "a", "score": NaN}, {"text": "b", "score": 1}]}',
        "samples[0].score",
        "NaN is not JSON",
    ),
    ("Infinity", '{"weight": -Infinity}', "weight", "-Infinity is not JSON"),
    ("a NUL character", PLAIN | {"chosen": "4\0"}, "chosen", "a NUL character at position 1"),
    (
        "half a character",
        sides([USER, FOUR], [USER, assistant("ab\ud83d")]),
        "rejected.messages[1].content",
        "half a character (\\ud83d, a lone surrogate) at position 2",
    ),
    ("half a character in a key", '{"\\udc00": 1}', "'\\udc00'", "lone surrogate"),
    ("too deep", "[" * 5000 + "]" * 5000, "row", "nested too deeply"),
    ("a huge integer", '{"id": ' + "9" * 5000 + "}", "row", "not usable as JSON"),
    (
        "no key of any format",
        {"question": "2+2?", "answer": "4"},
        "row",
        "the keys here are question, answer; accepted",
    ),
    ("an empty object", {}, "row", "there are no keys here; accepted are `chosen` and `rejected`"),
    ("numbers for sides", {"chosen": 4, "rejected": 5}, "chosen", "the number 4; accepted are"),
    (
        "an object without messages",
        {"chosen": FOUR, "rejected": FOUR},
        "chosen",
        "(the keys here are role, content)",
    ),
    ("a prompt of another type", PLAIN | {"prompt": 4}, "prompt", "the number 4; accepted are"),
    ("two formats", GOOD | {"input": "2+2?"} | OUTPUTS, "row", "fits 2 formats: messages"),
    ("messages and samples", GOOD | {"samples": []}, "row", "fits 2 formats: messages"),
    ("prompt messages beside whole ones", GOOD | {"prompt": [USER]}, "row", "fits 2 formats: messages"),
    (
        "sides of two forms",
        {"chosen": "4", "rejected": [USER, FIVE]},
        "rejected",
        "a list, while chosen is text",
    ),
    (
        "a weight of 0",
        sides([USER, FOUR | {"weight": 0}], [USER, FIVE]),
        "chosen.messages[1].weight",
        "0 on a turn of the response, all of which are scored",
    ),
    (
        "another weight",
        sides([USER, FOUR | {"weight": 0.5}], [USER, FIVE]),
        "chosen.messages[1].weight",
        "the number 0.5; expected 0 or 1",
    ),
    (
        "a picture in a turn",
        sides([USER | {"images": ["a.png"]}, FOUR], [USER, FIVE]),
        "chosen.messages[0].images",
        "a list of 1; only text",
    ),
    ("a picture beside", GOOD | {"images": ["a.png"]}, "images", "a list of 1; only text"),
    ("documents", GOOD | {"documents": [{"text": "2+2=4"}]}, "documents", "put them into the messages"),
    (
        "template settings",
        GOOD | {"chat_template_kwargs": {"enable_thinking": True}},
        "chat_template_kwargs",
        "the chat template is run as it stands",
    ),
    ("only chosen", {"chosen": GOOD["chosen"], "id": 3}, "rejected", "missing; the keys here are chosen, id"),
    ("only rejected", {"rejected": [USER, FIVE]}, "chosen", "missing; the keys here are rejected"),
    ("no input", OUTPUTS, "input", "missing; the keys here are preferred_output, non_preferred_output"),
    (
        "input without messages",
        OUTPUTS | {"input": {"tools": []}},
        "input.messages",
        "missing; the keys here are tools",
    ),
    (
        "no rejected output",
        {"input": "2+2?", "preferred_output": "4"},
        "non_preferred_output",
        "missing; the keys here are input, preferred_output",
    ),
    (
        "messages as text",
        sides("2+2? 4", "2+2? 5"),
        "chosen.messages",
        'the string "2+2? 4"; expected a list of messages',
    ),
    (
        "no messages",
        sides([USER, FOUR], []),
        "rejected.messages",
        "an empty list; expected at least one message",
    ),
    (
        "an empty output",
        OUTPUTS | {"input": "2+2?", "non_preferred_output": []},
        "non_preferred_output",
        "an empty list",
    ),
    (
        "a message as text",
        sides(["2+2?", FOUR], [USER, FIVE]),
        "chosen.messages[0]",
        'the string "2+2?"; expected a mess',
    ),
    (
        "no role",
        sides([USER, {"content": "4"}], [USER, FIVE]),
        "chosen.messages[1].role",
        "missing; the keys here are con",
    ),
    (
        "ShareGPT keys",
        sides([{"from": "human", "value": "2+2?"}], [USER, FIVE]),
        "chosen.messages[0].role",
        "missing; the keys here are from, value",
    ),
    (
        "a role of another dialect",
        sides([{"role": "human", "content": "2+2?"}, FOUR], [USER, FIVE]),
        "chosen.messages[0].role",
        'the string "human"; expected one of system, developer, user, assistant, tool, function',
    ),
    (
        "a role that is no string",
        sides([{"role": ["user"]}], [USER]),
        "chosen.messages[0].role",
        "a list of 1; expected one",
    ),
    (
        "no content",
        sides([USER, {"role": "assistant"}], [USER, FIVE]),
        "chosen.messages[1].content",
        "missing; the keys",
    ),
    (
        "null content",
        sides([USER, FOUR], [USER, assistant(None)]),
        "rejected.messages[1].content",
        "null only beside tool",
    ),
    (
        "a number as content",
        sides([user(4), FOUR], [USER, FIVE]),
        "chosen.messages[0].content",
        "the number 4; expected a s",
    ),
    (
        "an image",
        sides([user([{"type": "text", "text": "A cat?"}, IMAGE]), FOUR], [USER, FIVE]),
        "chosen.messages[0].content[1].type",
        'the string "image_url"; only text parts',
    ),
    (
        "a part without a type",
        sides([user(["a"]), FOUR], [USER, FIVE]),
        "chosen.messages[0].content[0]",
        "expected a part",
    ),
    (
        "a part without text",
        sides([user([{"type": "text"}]), FOUR], [USER, FIVE]),
        "chosen.messages[0].content[0].text",
        "null; expected a string",
    ),
    (
        "an empty response",
        sides([USER, FOUR], [USER, assistant("")]),
        "rejected.messages[1].content",
        "an empty response",
    ),
    (
        "a blank response",
        sides([USER, assistant(" \n")], [USER, FIVE]),
        "chosen.messages[1].content",
        "an empty response",
    ),
    (
        "a blank turn in a long response",
        sides([USER, FOUR, user("?"), assistant("")], [USER, FIVE, user("?"), assistant("b")]),
        "chosen.messages[3].content",
        "an empty response",
    ),
    (
        "an empty output text",
        OUTPUTS | {"input": "2+2?", "preferred_output": ""},
        "preferred_output",
        "an empty string",
    ),
    (
        "identical sides",
        sides([USER, FOUR], [USER, FOUR]),
        "rejected.messages[1]",
        "identical: there is nothing to prefer",
    ),
    ("identical texts", PLAIN | {"chosen": "5"}, "rejected", "identical"),
    (
        "another question",
        sides([user("What is 2+2?"), FOUR], [user("What is 2+3?"), FIVE]),
        "rejected.messages[0]",
        'different prompts: from character 10 on "3?" here, "2?" on the other side',
    ),
    (
        "another question later",
        sides([USER, FOUR, user("a"), FOUR], [USER, FIVE, user("b"), FIVE]),
        "rejected.messages[2]",
        "different prompts",
    ),
    (
        "a question on one side only",
        sides([USER, FOUR], [USER, FOUR, user("Sure?"), FIVE]),
        "rejected.messages[2]",
        "different prompts: this user turn is on one side only",
    ),
    (
        "a system turn on one side only",
        sides([{"role": "system", "content": "Hi"}, USER, FOUR], [USER, FIVE]),
        "rejected.messages[0]",
        "different prompts: a turn of role user here, of role system on the other side",
    ),
    (
        "other tool results before any answer",
        sides([USER, {"role": "tool", "content": "4"}, FOUR], [USER, {"role": "tool", "content": "5"}, FIVE]),
        "rejected.messages[1]",
        "different prompts",
    ),
    (
        "the same text with another name",
        sides([user("2+2?", name="ann"), FOUR], [user("2+2?", name="bob"), FIVE]),
        "rejected.messages[0]",
        "the same content but other fields",
    ),
    (
        "no prompt",
        sides([FOUR], [FIVE]),
        "rejected.messages[0]",
        "no prompt: both sides start with an assistant turn",
    ),
    (
        "nothing asked",
        sides([user(" "), FOUR], [user(" "), FIVE]),
        "chosen.messages[0].content",
        "the prompt is empty",
    ),
    (
        "a last turn of the user",
        sides([USER, FOUR, user("Thanks")], [USER, FIVE]),
        "chosen.messages[2].role",
        "the last turn is of role 'user'; expected 'assistant'",
    ),
    (
        "the prompt again in the output",
        OUTPUTS | {"input": [USER], "preferred_output": [USER, FOUR]},
        "preferred_output[0].role",
        "the first turn of a response (the prompt stands apart) is of role 'user'",
    ),
    ("an empty prompt", PLAIN | {"prompt": ""}, "prompt", "an empty string; expected some text"),
    ("an empty prompt list", {"prompt": [], "chosen": [FOUR], "rejected": [FIVE]}, "prompt", "an empty list"),
    (
        "an empty plain response",
        PLAIN | {"rejected": "\t"},
        "rejected",
        'the string "\\t"; expected some text',
    ),
    (
        "a text that is none",
        {"chosen": {"text": 4}, "rejected": {"text": "5"}},
        "chosen.text",
        "the number 4; expected some",
    ),
    (
        "a question beside bare texts",
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        "question",
        "put it into `prompt`",
    ),
    (
        "a system text beside bare texts",
        PLAIN | {"system": "Be brief."},
        "system",
        "not used beside plain texts",
    ),
    ("tools beside bare texts", PLAIN | {"tools": [{"name": "add"}]}, "tools", "not used beside plain texts"),
    (
        "a system text beside messages",
        GOOD | {"system": "Be brief."},
        "system",
        "is no turn of the conversations",
    ),
    ("another question in prompt", GOOD | {"prompt": "3+3?"}, "prompt", 'the string "3+3?" is no turn of'),
    ("tools that are no list", GOOD | {"tools": "[]"}, "tools", 'the string "[]"; expected a list of tools'),
    (
        "other tools on one side",
        {
            "chosen": GOOD["chosen"] | {"tools": [{"a": 1}]},
            "rejected": GOOD["rejected"] | {"tools": [{"a": True}]},
        },
        "rejected.tools",
        "other tools than in chosen.tools",
    ),
    (
        "tools on one side only",
        {"chosen": GOOD["chosen"] | {"tools": [{"a": 1}]}, "rejected": GOOD["rejected"]},
        "rejected.tools",
        "other tools than in chosen.tools",
    ),
    (
        "tool calls of the user",
        sides([user("2+2?", tool_calls=[{}]), FOUR], [USER, FIVE]),
        "chosen.messages[0].tool_calls",
        "only the assistant calls tools",
    ),
    (
        "tool calls that are no list",
        sides([USER, assistant(None, tool_calls="add(2, 2)")], [USER, FIVE]),
        "chosen.messages[1].tool_calls",
        'the string "add(2, 2)"; expected a list of objects',
    ),
    ("samples that are no list", {"samples": {"a": 1}}, "samples", "expected a list of objects"),
    (
        "one sample",
        {"samples": [{"text": "a", "score": 1}]},
        "samples",
        "a list of 1; expected 2 to 64 answers",
    ),
    (
        "a prompt that whole texts do not begin with",
        {"prompt": "Q:", "samples": [{"text": f"A: {text}", "score": s} for s, text in enumerate("ab")]},
        "prompt",
        'the string "Q:" beside whole texts that do not begin with it; give them as `completions`',
    ),
    (
        "a ranked list of whole texts",
        {"samples": [{"text": text, "score": score} for score, text in enumerate("abc")]},
        "samples",
        "more than two whole texts; give their prompt apart",
    ),
    (
        "a tie",
        {"samples": [{"text": "a", "score": 1}, {"text": "b", "score": 1.0}]},
        "samples[1].score",
        "a tie: both answers are equally good",
    ),
    (
        "no score",
        {"samples": [{"text": "a"}, {"text": "b", "score": 1}]},
        "samples[0].score",
        "expected score or evals.score",
    ),
    (
        "a score that is no number",
        {"samples": [{"text": "a", "score": "best"}, {"text": "b", "score": 1}]},
        "samples[0].score",
        'the string "best"; expected a finite number',
    ),
    (
        "true for a score",
        {"samples": [{"text": "a", "score": True}, {"text": "b", "score": 0}]},
        "samples[0].score",
        "true; expected a finite number",
    ),
    (
        "two scores",
        {"samples": [{"text": "a", "score": 2, "evals": {"score": 1}}, {"text": "b", "score": 0}]},
        "samples[0].score",
        "the number 2, but evals.score is the number 1",
    ),
    (
        "messages and text among samples",
        {"samples": [{"messages": [USER, FOUR], "score": 2}, {"text": "b", "score": 0}]},
        "samples",
        "expected messages in all or text in all",
    ),
]
BAD_ROW_IDS = [name for name, *_ in BAD_ROWS]


@pytest.mark.parametrize(("row", "field", "reason"), [row[1:] for row in BAD_ROWS], ids=BAD_ROW_IDS)
def test_a_bad_row_is_refused_where_and_why(tmp_path: Path, row: Any, field: str, reason: str) -> None:
    path = write(tmp_path, GOOD, row, GOOD)

    with pytest.raises(RowError) as caught:
        read_preferences(path)

    assert str(caught.value).startswith(f"{path}:2: {field}: ")
    assert reason in caught.value.reason
    assert (caught.value.path, caught.value.line, caught.value.field) == (str(path), 2, field)


def test_among_bad_rows_no_good_row_is_lost(tmp_path: Path) -> None:
    rows = [row for _, bad, *_ in BAD_ROWS for row in (GOOD, bad)] + [GOOD]

    file = read_preferences(write(tmp_path, *rows), on_bad_row="skip")

    assert [example.line for example in file.examples] == list(range(1, len(rows) + 1, 2))
    assert [(error.line, error.field) for error in file.bad] == [
        (2 * index, field) for index, (_, _, field, _) in enumerate(BAD_ROWS, start=1)
    ]
    assert file.rows == len(rows)


def test_many_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, *[{"id": number} for number in range(12)])

    with pytest.raises(DataError) as caught:
        read_preferences(path)

    text = str(caught.value)
    assert "12 rows cannot be used" in text
    assert f"{path}:2: row: the keys here are id" in text
    assert f"{path}:11: row" in text
    assert f"{path}:12: row" not in text
    assert "and 2 more" in text
    assert 'on_bad_row="skip"' in text


def test_no_row_fits_two_formats_and_each_has_its_own_claim() -> None:
    rows = {name.split(" ")[0]: row for name, row in SAME_CONVERSATION.items()}
    rows |= {"prompt-text": PLAIN, "text": {"chosen": "a", "rejected": "b"}}
    for name, row in rows.items():
        assert [form.name for form in FORMATS if form.claims(row)] == [name]


def test_errors_of_examples_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ExampleError("chosen", "empty")))
    assert str(error) == "chosen: empty"
    assert str(error.at("a.jsonl", 3)) == "a.jsonl:3: chosen: empty"


# Files


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_rows_of_different_formats_are_refused_with_the_lines_of_each(
    tmp_path: Path, on_bad_row: Any
) -> None:
    with pytest.raises(
        DataError, match=r"messages in lines 1, 2, 3 and 1 more; prompt-text in line 4\. Keep each"
    ):
        read_preferences(write(tmp_path, GOOD, GOOD, GOOD, PLAIN, GOOD), on_bad_row)


def test_gzip_byte_order_mark_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n".join(["", json.dumps(GOOD), "  ", json.dumps(GOOD)])
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_text(text, encoding="utf-8", newline="")
    packed.write_bytes(gzip.compress(text.encode()))

    for path in (plain, packed):
        file = read_preferences(path)
        assert [example.line for example in file.examples] == [2, 4]
        assert file.rows == 2


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    row = json.dumps(PLAIN | {"chosen": "4\u2028\u0085"}, ensure_ascii=False)
    (example,) = read_preferences(write(tmp_path, row)).examples
    assert example.chosen == "4\u2028\u0085"


def test_a_row_over_the_size_limit_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 250)
    path = write(tmp_path, GOOD, PLAIN | {"chosen": "x" * 1000}, GOOD, PLAIN | {"chosen": "x" * 300})

    file = read_preferences(path, "skip")

    assert [example.line for example in file.examples] == [1, 3]
    assert [str(error) for error in file.bad] == [
        f"{path}:{line}: row: more than 250 bytes in one line" for line in (2, 4)
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty; expected one JSON object per line"),
        (b"\n \n", "the file is empty"),
        (json.dumps([GOOD]).encode(), "one JSON array"),
        (json.dumps([GOOD], indent=2).encode(), "one JSON array"),
        (b"[\n" + json.dumps(GOOD).encode() + b"\n]\n", "one JSON array"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"PAR1\x15\x04", "Parquet"),
        (gzip.compress(json.dumps(GOOD).encode())[:-9], "cannot be read"),
    ],
    ids=["empty", "blank", "array", "indented array", "array of lines", "UTF-16", "Parquet", "cut gzip"],
)
@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_file_that_is_no_json_lines_is_refused(
    tmp_path: Path, content: bytes, reason: str, on_bad_row: Any
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_preferences(path, on_bad_row)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)


def test_a_file_without_a_usable_row_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 2 rows can be used"):
        read_preferences(write(tmp_path, {"id": 1}, {"id": 2}), "skip")
    with pytest.raises(DataError, match="its only row cannot be used"):
        read_preferences(write(tmp_path, {"id": 1}), "skip")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such file$"):
        read_preferences(tmp_path / "nowhere.jsonl")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path)


def test_an_unknown_policy_for_bad_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_bad_row: 'ignore' is neither"):
        read_preferences(write(tmp_path, GOOD), "ignore")  # type: ignore[arg-type]


def test_weights_of_prompt_turns_and_weights_of_1_say_what_is_done_anyway(tmp_path: Path) -> None:
    earlier = [USER, FIVE | {"weight": 0}, USER | {"content": "Sure?"}]
    row = sides([*earlier, FOUR | {"weight": 1}], [*earlier[:1], FIVE, *earlier[2:], FIVE])
    (example,) = read_preferences(write(tmp_path, row)).examples
    assert isinstance(example, ChatExample)
    assert len(example.prompt) == 3
    assert not any("weight" in turn for turn in (*example.prompt, *example.chosen, *example.rejected))


FORMS = {
    **{name: row for name, row in SAME_CONVERSATION.items() if " " not in name},
    "prompt-text": PLAIN,
    "text": {"chosen": "2+2=4", "rejected": "2+2=5"},
    "completions": {"prompt": "2+2=", "completions": ["4", "5", "6"], "scores": [2, 1, 0]},
}


@pytest.mark.parametrize("form", [form.name for form in FORMATS])
def test_a_row_of_any_form_may_say_its_source(form: str) -> None:
    def source_of(beside: dict[str, Any]) -> str | None:
        name, example = read_row(json.dumps(FORMS[form] | beside).encode(), 1)
        assert name == form
        return example.source

    given = [{}, {"source": None}, {"source": "forum"}]
    assert [source_of(beside) for beside in given] == [None, None, "forum"]


@pytest.mark.parametrize("source", [3, ["forum"], {"name": "forum"}, True])
def test_a_source_that_is_no_string_is_an_error_of_its_row(source: object) -> None:
    with pytest.raises(ExampleError, match=r"^source: .*; expected a string, the name of where the row is"):
        read_row(json.dumps(PLAIN | {"source": source}).encode(), 1)
