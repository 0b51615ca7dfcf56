"""Conversion between forms: there and back the tokens are the same, and what would be lost is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from every_form import (
    BESIDE,
    QUESTIONS,
    WORDS,
    answers,
    chat_lists,
    chats,
    conversations,
    plain_texts,
    whole_texts,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, CHATML_MARKED, CHATML_WITH_TOOLS, LLAMA_3, byte_tokenizer

from firesteel.sdk.errors import ConfigError, DataError, RowError
from training.utils.data_forms import Target, convert, convert_file
from training.utils.jsonl import LocatedRow, located_rows
from training.utils.preference_examples import ExampleError
from training.utils.preference_rows import PREFERENCES
from training.utils.preference_sides import Side
from training.utils.preference_writers import PREFERENCE_FORMS
from training.utils.rendering import Renderer
from training.utils.row_check import RowKind
from training.utils.row_kinds import kind_of
from training.utils.sft_rows import SFT
from training.utils.sft_writers import SFT_FORMS

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
    assert convert_file(path, Target(there), other, "fail", print).rows == 1
    assert form(str(other)) == there
    convert_file(str(other), Target(here), again, "fail", print)
    assert tokens(path) == tokens(str(other)) == tokens(str(again))
    kept = {"id", "weight", "source"} & row.keys()
    assert {key: json.loads(other.read_text())[key] for key in kept} == {key: row[key] for key in kept}


def test_scores_survive_forms_without_a_place_for_them(tmp_path: Path) -> None:
    path, other, again = write(tmp_path, SCORED), tmp_path / "other.jsonl", tmp_path / "again.jsonl"
    convert_file(path, Target("messages"), other, "fail", print)
    assert json.loads(other.read_text()) | {"chosen": 0, "rejected": 0} == {
        "chosen": 0,
        "rejected": 0,
        "score_chosen": 9.5,
        "score_rejected": 2,
    }
    convert_file(str(other), Target("samples"), again, "fail", print)
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
        convert_file(write(tmp_path, row), Target(to), out, "fail", print)
    assert f"rows.jsonl:1: {reason}" in str(refused.value)
    assert not out.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path, out = write(tmp_path, MESSAGES, {"chosen": 1}, MESSAGES), tmp_path / "out.jsonl"
    with pytest.raises(RowError):
        convert_file(path, Target("samples"), out, "fail", print)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    done = convert_file(path, Target("samples"), out, "skip", print)
    assert (done.rows, done.refused_count, done.refused[0].line) == (2, 1, 2)
    assert len(out.read_text().splitlines()) == 2


def test_an_unknown_form_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--to parquet: rows of this kind are written as messages, preferred_out"
    ):
        convert_file(write(tmp_path, MESSAGES), Target("parquet"), None, "fail", print)


# Every accepted form, and everything that is written. `every_form.py` writes by hand what hypothesis makes up.

Row = dict[str, Any]
RENDERER = Renderer(byte_tokenizer(CHATML_WITH_TOOLS))
GOING_ALONG = ("id", "source", "weight")


@dataclass(frozen=True)
class Case:
    """A row, and the forms that can say the same: those of its own kind, and supervised ones for its best answer."""

    row: Row
    forms: set[str]
    supervised: set[str]


@st.composite
def preferences(draw: st.DrawFn) -> Case:
    question, (best, worst), calling = draw(QUESTIONS), draw(answers()), draw(st.booleans())
    of_chats = {"messages", "completion", "sharegpt"} | (set() if calling or question.earlier else {"alpaca"})
    case = draw(
        st.sampled_from(
            [
                *(
                    Case(row, {*OF_MESSAGES}, of_chats)
                    for row in chats(question, best, worst, calling=calling)
                ),
                *(
                    Case(row, {"prompt-text", "completions"}, {"completion"})
                    for row in plain_texts(best, worst)
                ),
                *(Case(row, {"text", "samples"}, {"text"}) for row in whole_texts(best, worst)),
            ]
        )
    )
    return replace(case, row=case.row | draw(BESIDE))


@st.composite
def ranked_lists(draw: st.DrawFn) -> Case:
    question, ranked = draw(QUESTIONS), draw(answers(3, 5))
    of_chats = {"messages", "completion", "sharegpt"} | (set() if question.earlier else {"alpaca"})
    of_texts = {"prompt": "Q:", "completions": ranked, "ranks": [*range(len(ranked))]}
    cases = [Case(row, {"samples", "completions"}, of_chats) for row in chat_lists(question, ranked)]
    case = draw(st.sampled_from([*cases, Case(of_texts, {"completions"}, {"completion"})]))
    return replace(case, row=case.row | draw(BESIDE))


@st.composite
def supervised_rows(draw: st.DrawFn) -> Case:
    question, answer, learned = draw(QUESTIONS), draw(WORDS), draw(st.booleans())
    forms = {"messages", "completion", "sharegpt"}
    forms |= {"alpaca"} if learned or not question.earlier else set()
    cases = [Case(row, forms, set()) for row in conversations(question, answer, learned=learned)]
    texts = Case({"prompt": "Q:", "completion": answer}, {"completion"}, set())
    case = draw(st.sampled_from([*cases, texts, Case({"text": f"Q: {answer}"}, {"text"}, set())]))
    return replace(case, row=case.row | draw(BESIDE))


def located(row: Row) -> LocatedRow:
    return LocatedRow(1, 0, json.dumps(row).encode())


def rendered(row: Row, kind: RowKind[Any], renderer: Renderer = RENDERER) -> tuple[str, list[Any]]:
    """The form of a row; tokens of each answer, the best first, and which of them are scored."""
    found = kind.render(located(row), renderer)
    return found.form, [(side.tokens, side.mask.tolist()) for side in found.answers.sides.values()]


def written(row: Row, forms: tuple[str, ...], kind: RowKind[Any], side: Side | None = None) -> dict[str, Row]:
    """The row in every form that does not refuse it; what goes along does so."""
    found = {}
    for form in forms:
        with contextlib.suppress(ExampleError):
            found[form] = convert(located(row), Target(form, side), kind)
    for new in found.values():
        assert [new.get(key) for key in GOING_ALONG] == [row.get(key) for key in GOING_ALONG]
    return found


@given(preferences() | ranked_lists())
@settings(deadline=None)
def test_a_preference_is_the_same_in_every_form_that_can_say_it(case: Case) -> None:
    found = written(case.row, PREFERENCE_FORMS, PREFERENCES)
    assert found.keys() == case.forms
    _, sides = rendered(case.row, PREFERENCES)
    for form, new in found.items():
        assert rendered(new, PREFERENCES) == (form, sides)


@given(supervised_rows())
@settings(deadline=None)
def test_a_supervised_row_is_the_same_in_every_form_that_can_say_it(case: Case) -> None:
    found = written(case.row, SFT_FORMS, SFT)
    assert found.keys() == case.forms
    _, sides = rendered(case.row, SFT)
    for form, new in found.items():
        assert rendered(new, SFT) == (form, sides)


@given(preferences() | ranked_lists())
@settings(deadline=None)
def test_a_side_learned_is_that_of_the_preference_token_for_token(case: Case) -> None:
    _, ((chosen, scored), *_, (rejected, scored_too)) = rendered(case.row, PREFERENCES)
    found = written(case.row, SFT_FORMS, PREFERENCES, "chosen")
    assert found.keys() == case.supervised
    whole = case.supervised == {"text"}  # what the two texts share is learned too
    for form, new in found.items():
        learned = [0.0, *([1.0] * (len(chosen) - 1))] if whole else scored
        assert rendered(new, SFT) == (form, [(chosen, learned)])
    for form, new in written(case.row, SFT_FORMS, PREFERENCES, "rejected").items():
        learned = [0.0, *([1.0] * (len(rejected) - 1))] if whole else scored_too
        assert rendered(new, SFT) == (form, [(rejected, learned)])


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, LLAMA_3], ids=["ChatML", "marked", "Llama 3"])
@given(case=preferences())
@settings(deadline=None, max_examples=25)
def test_it_is_so_under_other_templates(template: str, case: Case) -> None:
    assume("tools" not in json.dumps(case.row))
    renderer = Renderer(byte_tokenizer(template, end="<|eot|>" if template == LLAMA_3 else "<|im_end|>"))
    _, (chosen, _) = rendered(case.row, PREFERENCES, renderer)
    for form, new in written(case.row, SFT_FORMS, PREFERENCES, "chosen").items():
        learned = rendered(new, SFT, renderer)
        assert learned == (form, [chosen]) or (form == "text" and learned[1][0][0] == chosen[0])


def test_a_chosen_side_that_stands_beside_the_pair_once_more_is_not_in_the_way() -> None:
    """As in UltraFeedback's rows."""
    row = {
        "chosen": [USER, FOUR],
        "rejected": [USER, FIVE],
        "messages": [USER, FOUR],
        "prompt": USER["content"],
    }
    sides: tuple[Side, ...] = ("chosen", "rejected")
    for side in sides:
        assert written(row, SFT_FORMS, PREFERENCES, side).keys() == {
            "messages",
            "completion",
            "alpaca",
            "sharegpt",
        }


def test_the_turns_of_a_prompt_are_not_learned() -> None:
    """Each form says so in its own way, and that of Alpaca cannot."""
    prompt = [USER, FIVE, USER]
    row = {"prompt": prompt, "chosen": [FOUR], "rejected": [FIVE]}
    assert written(row, SFT_FORMS, PREFERENCES, "chosen") == {
        "messages": {"messages": [USER, {**FIVE, "weight": 0}, USER, FOUR]},
        "completion": {"prompt": prompt, "completion": [FOUR]},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": "5", "weight": 0},
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": "4"},
            ]
        },
    }


@pytest.mark.parametrize("ranked", [{"ranks": [2, 1]}, {}])
def test_ranks_are_no_scores_of_the_one_side_that_is_taken(ranked: dict[str, Any]) -> None:
    answers: list[Any] = ["no", "yes"] if ranked else [{"text": "no", "rank": 2}, {"text": "yes", "rank": 1}]
    row = {"prompt": "Q:", "completions": answers, **ranked}
    taken = convert(located(row), Target("completion", "chosen"), PREFERENCES)
    assert taken == {"prompt": "Q:", "completion": "yes"}


def test_the_best_of_a_list_is_taken_with_what_is_said_of_it() -> None:
    row = {
        "prompt": "Q:",
        "completions": [
            {"text": "no", "score": 0, "model": "a"},
            {"text": "yes", "score": 3, "model": "b", "evals": {"score": 3, "style": 2}},
            {"text": "perhaps", "score": 1, "model": "c"},
        ],
        "id": 7,
    }
    of_both = {"id": 7, "score_chosen": 3, "score_rejected": 0}
    assert convert(located(row), Target("completion", "chosen"), PREFERENCES) == {
        "prompt": "Q:",
        "completion": "yes",
        "model": "b",
        "evals": {"score": 3, "style": 2},
        **of_both,
    }
    assert convert(located(row), Target("completion", "rejected"), PREFERENCES) == {
        "prompt": "Q:",
        "completion": "no",
        "model": "a",
        **of_both,
    }


TIED = [{"messages": [USER, FOUR], "score": 2}, {"messages": [USER, FIVE], "score": 2}]
WORSE = {"messages": [USER, {**FIVE, "content": "6"}], "score": 1}
SPOKEN = {"prompt": [USER, FIVE, USER], "chosen": [FOUR], "rejected": [FIVE]}
NAMED = {"prompt": [{**USER, "name": "Ada"}], "chosen": [FOUR], "rejected": [FIVE]}
DEVELOPED = {"prompt": [{**USER, "role": "developer"}, USER], "chosen": [FOUR], "rejected": [FIVE]}


@pytest.mark.parametrize(
    ("row", "to", "reason"),
    [
        ({"samples": [WORSE, *TIED]}, "messages", "samples[2].score: a tie: 2 answers are the best"),
        ({**RANKED, "ranks": [1, 1, 2]}, "messages", "ranks[1]: a tie: 2 answers are the best"),
        (MESSAGES, "alpaca", "row: has tools, and that form none"),
        (SPOKEN, "alpaca", 'row: "5", a turn of role assistant, is not learned, and in that form all answers'),
        (NAMED, "alpaca", 'row: "2+2? é 😀", a turn of role user, has `name`, and that form texts only'),
        (DEVELOPED, "alpaca", 'row: has turns that are no questions and answers in pairs'),
        (DEVELOPED, "sharegpt", "row: has a turn of role developer, which that form does not name"),
        (PLAIN, "messages", "row: holds texts, and that form messages"),
        (PLAIN, "text", "row: has a prompt that is not learned, and of that form all is"),
        (SPOKEN, "text", "row: holds messages, and that form a text"),
        (TEXTS, "completion", "row: is one whole text, and a completion has its prompt apart"),
        ({**SPOKEN, "label": 0}, "messages", "label: as messages: the number 0: the answer is marked as a bad"),
        ({**SPOKEN, "messages": [USER]}, "messages", "messages: a list of 1 stands beside what the row says"),
        ({**SPOKEN, "question": "1+1?"}, "messages", "question: as messages: the string"),
    ],
)  # fmt: skip
def test_a_side_that_cannot_be_said_is_refused_by_line_and_field(
    tmp_path: Path, row: Row, to: str, reason: str
) -> None:
    with pytest.raises(DataError) as refused:
        convert_file(write(tmp_path, row), Target(to, "chosen"), tmp_path / "out.jsonl", "fail", print)
    assert f"rows.jsonl:1: {reason}" in str(refused.value)


def test_a_rank_of_0_is_a_score_of_0() -> None:
    row = {"prompt": [USER], "completions": ["4", "5"], "ranks": [0, 1]}
    samples = json.dumps(convert(located(row), Target("samples"), PREFERENCES))
    assert '"score": 0.0}' in samples
    pair = convert(located(row), Target("messages"), PREFERENCES)
    assert str(pair["score_chosen"]) == "0.0"


def test_of_a_message_that_is_an_answer_nothing_is_left_over() -> None:
    row = {"prompt": [USER], "completions": [{**FOUR, "score": 2}, {**FIVE, "score": 1}]}
    new = convert(located(row), Target("samples"), PREFERENCES)
    assert [sample["messages"] for sample in new["samples"]] == [[USER, FOUR], [USER, FIVE]]


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"text": "4", "score": 2, "model": "a"}, "completions[0].model"),
        ({"text": "4", "score": 2, "evals": {"score": 2, "style": 1}}, "completions[0].evals"),
    ],
)
def test_what_stands_in_one_of_two_answers_has_no_place_where_both_are_kept(answer: Row, field: str) -> None:
    row = {"prompt": "2+2=", "completions": [answer, {"text": "5", "score": 1}]}
    with pytest.raises(ExampleError) as refused:
        convert(located(row), Target("prompt-text"), PREFERENCES)
    assert (refused.value.field, refused.value.reason[:20]) == (field, "has no place in anot")


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({**SPOKEN, "prompt": [USER], "history": [["1+1?", "2"]]}, Target("alpaca", "chosen")),
        ({**SPOKEN, "chosen": [{**FOUR, "train": 1}]}, Target("messages", "chosen")),
        ({"messages": [{"role": "system", "content": ""}, USER, FOUR]}, Target("alpaca")),
    ],
    ids=["a key that the form would read", "a field that would be a flag", "an empty turn"],
)
def test_a_row_that_would_be_read_in_another_way_is_refused(tmp_path: Path, row: Row, target: Target) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: row: as {target.form} it would say something else"):
        convert_file(path, target, None, "fail", print)


def test_a_list_with_two_worst_answers_has_a_best_one_still() -> None:
    row = {**RANKED, "ranks": [1, 3, 3]}
    assert convert(located(row), Target("completion", "chosen"), PREFERENCES)["completion"] == [FOUR]
    with pytest.raises(ExampleError, match=r"^ranks\[2\]: a tie: 2 answers are the worst"):
        convert(located(row), Target("completion", "rejected"), PREFERENCES)


@pytest.mark.parametrize(
    ("row", "target", "reason"),
    [
        (TURNS, Target("preferred_output"), "a form of preferences.*none that is rejected. Find a worse answer"),
        (TURNS, Target("messages", "chosen"), "--side chosen: the rows of .* are supervised"),
        (MESSAGES, Target("alpaca"), "--to alpaca: a form of supervised rows.*with --side chosen"),
        (MESSAGES, Target("samples", "chosen"), "with --side chosen rows are written as messages, completion, al"),
    ],
    ids=["chats as preferences", "a side of chats", "preferences as chats, no side", "a side as preferences"],
)  # fmt: skip
def test_a_form_of_the_other_kind_is_refused_with_what_to_do(
    tmp_path: Path, row: Row, target: Target, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        convert_file(write(tmp_path, row), target, None, "fail", print)


@pytest.mark.parametrize(
    ("row", "to", "kept"),
    [
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE], "input": "x"}, "messages", {"input": "x"}),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE], "messages": [USER]}, "samples", {"messages": [USER]}),
        ({**PLAIN, "score_chosen": None, "scores": [1]}, "prompt-text", {"score_chosen": None, "scores": [1]}),
    ],
)  # fmt: skip
def test_what_only_other_forms_read_goes_along(row: Row, to: str, kept: Row) -> None:
    new = convert(located(row), Target(to), PREFERENCES)
    assert {key: new[key] for key in kept} == kept


def test_what_would_be_read_in_the_other_form_is_refused() -> None:
    row = {"chosen": [USER, FOUR], "rejected": [USER, FIVE], "input": "x"}
    with pytest.raises(ExampleError, match=r'^input: the string "x" stands beside what the row says'):
        convert(located(row), Target("preferred_output"), PREFERENCES)
