"""Supervised rows: what each form says, what is learned of it, token by token, and why a row is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_tokenizers import CHATML, CHATML_MARKED, CHATML_WITH_TOOLS, LLAMA_3, QWEN_3, byte_tokenizer

from firesteel.sdk import DataError, ModelError, RowError
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import select_rows
from training.utils.sft_data import read_sft_row
from training.utils.sft_examples import CompletionExample, SftExample, TurnsExample
from training.utils.sft_rows import SFT

SYSTEM = {"role": "system", "content": "Be short."}
ASKED = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "3+3?"}
SAID_AGAIN = {"role": "assistant", "content": "6"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
MARKED_WITHOUT_END = CHATML_MARKED.replace(
    "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
    "{{ message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
)


def read(row: dict[str, Any]) -> SftExample:
    return read_sft_row(json.dumps(row).encode(), 1)[1]


def learned(row: dict[str, Any], template: str = CHATML) -> tuple[str, str]:
    """The text of a row with what is learned in brackets; and the learned text alone."""
    tokenizer = byte_tokenizer(template)
    side = Renderer(tokenizer).render_learned(read(row))
    marked, alone, inside = "", "", False
    for token, weight in zip(side.tokens, side.mask, strict=True):
        if bool(weight) != inside:
            marked, inside = marked + ("[" if weight else "]"), bool(weight)
        text = str(tokenizer.decode([token]))
        marked += text
        alone += text if weight else ""
    return marked + ("]" if inside else ""), alone


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


CONVERSATION = [SYSTEM, ASKED, SAID, AGAIN, SAID_AGAIN]
WHOLE = (
    turn("system", "Be short.") + turn("user", "2+2?") + "<|im_start|>assistant\n[4<|im_end|>]\n"
    + turn("user", "3+3?") + "<|im_start|>assistant\n[6<|im_end|>]"
)  # fmt: skip

SAME_CONVERSATION: dict[str, dict[str, Any]] = {
    "messages": {"messages": CONVERSATION},
    "alpaca": {
        "instruction": "3+3?",
        "input": "",
        "output": "6",
        "system": "Be short.",
        "history": [["2+2?", "4"]],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "4"},
            {"from": "user", "value": "3+3?"},
            {"from": "assistant", "value": "6"},
        ]
    },
    "sharegpt, system apart": {
        "system": "Be short.",
        "conversations": [
            {"from": f, "value": v}
            for f, v in (("human", "2+2?"), ("gpt", "4"), ("human", "3+3?"), ("gpt", "6"))
        ],
    },
}


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "generation marks"])
@pytest.mark.parametrize("form", SAME_CONVERSATION)
def test_every_turn_of_the_assistant_is_learned_to_its_end_and_nothing_else(form: str, template: str) -> None:
    assert learned(SAME_CONVERSATION[form], template)[0] == WHOLE


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_MARKED, LLAMA_3, QWEN_3], ids=["chatml", "marked", "llama", "qwen"]
)
def test_a_turn_of_weight_0_is_read_and_not_learned(template: str) -> None:
    silent = {"messages": [ASKED, {**SAID, "weight": 0}, AGAIN, {**SAID_AGAIN, "weight": 1}]}
    only_last = {"prompt": [ASKED, SAID, AGAIN], "completion": [SAID_AGAIN]}
    marked, alone = learned(silent, template)
    assert marked == learned(only_last, template)[0]
    assert alone.startswith("6<|")
    assert "4" in marked


def test_instruction_and_input_are_two_lines_of_one_message() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert learned(row)[0] == turn("user", "Add.\n2 and 2") + "<|im_start|>assistant\n[4<|im_end|>]"


def test_plain_completions_and_texts_use_no_template() -> None:
    assert learned({"prompt": "2+2=", "completion": "4"})[0] == "2+2=[4<|im_end|>]"
    assert learned({"text": "2+2=4"})[0] == "2[+2=4<|im_end|>]"


def test_a_function_call_of_sharegpt_is_one_of_the_assistant() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
        "tools": json.dumps(TOOLS),
    }
    assert learned(row, CHATML_WITH_TOOLS)[1] == "[add]<|im_end|>It is 4.<|im_end|>"


def test_a_generation_block_without_the_end_of_turn_is_refused_and_says_where_to_put_it() -> None:
    with pytest.raises(ModelError, match=r'leaves out "<\|im_end\|>".*put endgeneration behind it'):
        learned({"messages": [ASKED, SAID]}, MARKED_WITHOUT_END)


def test_a_template_that_marks_only_the_last_answer_is_refused_for_several() -> None:
    last_only = CHATML_MARKED.replace(
        "{% if message.role == 'assistant' %}", "{% if message.role == 'assistant' and loop.last %}"
    )
    assert learned({"messages": [ASKED, SAID]}, last_only)[1] == "4<|im_end|>"
    with pytest.raises(DataError, match="marks 1 answers where the assistant has 2 turns"):
        learned({"messages": [ASKED, SAID, AGAIN, SAID_AGAIN]}, last_only)


def test_reasoning_that_the_template_drops_later_is_refused_where_it_would_be_learned() -> None:
    thought = {"role": "assistant", "content": "<think>\nHm\n</think>\n\n4"}
    assert learned({"messages": [ASKED, thought]}, QWEN_3)[1].startswith("<think>")
    with pytest.raises(DataError, match="rewrites turn 1 once others follow"):
        learned({"messages": [ASKED, thought, AGAIN, SAID_AGAIN]}, QWEN_3)
    row = {"messages": [ASKED, {**thought, "weight": 0}, AGAIN, SAID_AGAIN]}
    assert learned(row, QWEN_3)[1] == "6<|im_end|>"


THINKING = {"role": "assistant", "content": "<think>Hm</think>4"}
R1 = CHATML.replace("message.content +", "message.content.split('</think>')[-1] +")
HEADER_MARKED = CHATML_MARKED.replace(
    "{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}",
    "{% if message.role != 'assistant' %}{{ '<|im_start|>' + message.role + '\\n' }}{% endif %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' }}",
)
NEWLINE_MARKED = CHATML_MARKED.replace(
    "+ '<|im_end|>' }}{% endgeneration %}", "+ '<|im_end|>\\n' }}{% endgeneration %}"
)
OPENED_MARKED = CHATML_MARKED.replace(
    "{% generation %}", "{% generation %}{{ '<think>\\n\\n</think>\\n\\n' }}"
)


def test_learned_text_that_the_template_leaves_out_is_refused() -> None:
    template = R1
    with pytest.raises(DataError, match="leaves out the start of turn 1"):
        learned({"messages": [ASKED, THINKING]}, template)
    row = {"messages": [ASKED, {**THINKING, "weight": 0}, AGAIN, SAID_AGAIN]}
    assert learned(row, template)[1] == "6<|im_end|>"


@pytest.mark.parametrize(
    "template", [HEADER_MARKED, NEWLINE_MARKED, OPENED_MARKED], ids=["header", "newline", "opening"]
)
def test_marks_wider_than_what_the_model_writes_are_taken_without_the_rest(template: str) -> None:
    row = {"messages": [ASKED, SAID, AGAIN, SAID_AGAIN]}
    assert learned(row, template)[1] == "4<|im_end|>6<|im_end|>"


def test_an_end_of_turn_inside_a_marked_answer_is_refused_as_without_marks() -> None:
    with pytest.raises(DataError, match="which ends a turn; remove it"):
        learned({"messages": [ASKED, {**SAID, "content": "4<|im_end|>5"}]}, CHATML_MARKED)


def test_a_marked_turn_that_reads_otherwise_once_others_follow_is_refused() -> None:
    forgetful = CHATML_MARKED.replace(
        "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ (message.content if loop.last else message.content.split('</think>')[-1]) + '<|im_end|>' }}"
        "{% endgeneration %}",
    )
    assert learned({"messages": [ASKED, THINKING]}, forgetful)[1] == "<think>Hm</think>4<|im_end|>"
    with pytest.raises(DataError, match="rewrites turn 1 once others follow"):
        learned({"messages": [ASKED, THINKING, AGAIN, SAID_AGAIN]}, forgetful)


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (
        "the first turn once more, as ultrachat has it",
        {"messages": [ASKED, SAID], "prompt": "2+2?", "prompt_id": "x"},
    ),
    ("nulls as an export fills them in", {"messages": [ASKED, {**SAID, "weight": None}], "weight": None}),
    ("a good answer of KTO", {"messages": [ASKED, SAID], "label": True}),
    ("role and content in conversations", {"conversations": [ASKED, SAID]}),
    ("an input without an instruction", {"instruction": "", "input": "2+2?", "output": "4"}),
    ("axolotl's train", {"messages": [{**ASKED, "train": False}, {**SAID, "train": True}]}),
    ("parallel_tool_calls", {"messages": [ASKED, SAID], "parallel_tool_calls": False}),
]


@pytest.mark.parametrize("row", [row for _, row in ACCEPTED], ids=[name for name, _ in ACCEPTED])
def test_rows_as_they_are_found_are_read(row: dict[str, Any]) -> None:
    assert learned(row)[0] == turn("user", "2+2?") + "<|im_start|>assistant\n[4<|im_end|>]"


@pytest.mark.parametrize("flag", ["weight", "train", "loss"])
def test_a_turn_that_is_not_to_be_learned_is_said_by_any_of_three_names(flag: str) -> None:
    row = {"messages": [ASKED, {**SAID, flag: 0}, AGAIN, {**SAID_AGAIN, flag: 1}]}
    assert learned(row)[1] == "6<|im_end|>"


def test_functions_as_openai_once_called_them_are_the_assistants_turn() -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    example = read({"messages": [ASKED, called, {"role": "function", "name": "add", "content": "4"}, SAID]})
    assert isinstance(example, TurnsExample)
    assert example.learned == (False, True, False, True)


def test_several_calls_of_one_turn_are_kept() -> None:
    call = {"name": "add", "arguments": {}}
    row = {
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": json.dumps([call, call])},
        ]
    }
    assert learned({**row, "tools": TOOLS}, CHATML_WITH_TOOLS)[1] == "[add][add]<|im_end|>"


def test_texts_are_no_group_for_beginning_with_the_same_token(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"a{n}"}) + "\n" for n in range(6)))
    index = index_rows(str(path), Renderer(byte_tokenizer(adds_bos=True)), SFT)
    assert len(set(index.rows["prompt"].tolist())) == 6


def test_rows_of_one_question_are_one_group(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID_AGAIN]}, {"messages": [AGAIN, SAID_AGAIN]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = index_rows(str(path), Renderer(byte_tokenizer()), SFT).rows["prompt"].tolist()
    assert prompts[0] == prompts[1] != prompts[2]


def test_a_rows_weight_is_read() -> None:
    assert read({"prompt": "a", "completion": "b", "weight": 0.5}) == CompletionExample("a", "b", 1, 0.5)


BAD: list[tuple[str, Any, str, str]] = [
    ("a preference", {"chosen": "a", "rejected": "b"}, "row", "`firesteel dpo` and `orpo` train on these"),
    (
        "unknown keys",
        {"question": "a", "answer": "b"},
        "row",
        "the keys here are question, answer; accepted are `messages`",
    ),
    ("two forms", {"messages": [ASKED, SAID], "conversations": []}, "row", "fits 2 formats"),
    ("no turns", {"messages": []}, "messages", "an empty list"),
    ("nobody answers", {"messages": [ASKED]}, "messages[0].role", "the last turn is of role 'user'"),
    (
        "nobody asks",
        {"messages": [SAID]},
        "messages[0]",
        "nothing is asked; remove it, or give it the weight 0",
    ),
    (
        "all of weight 0",
        {"messages": [ASKED, {**SAID, "weight": 0}]},
        "messages[1].weight",
        "nothing is left to learn",
    ),
    ("a weight of 2", {"messages": [ASKED, {**SAID, "weight": 2}]}, "messages[1].weight", "expected 0 or 1"),
    (
        "a weighted question",
        {"messages": [{**ASKED, "weight": 1}, SAID]},
        "messages[0].weight",
        "on a turn that is not the assistant's",
    ),
    (
        "an empty answer",
        {"messages": [ASKED, {**SAID, "content": " "}]},
        "messages[1].content",
        "an empty turn",
    ),
    (
        "a prompt beside",
        {"prompt": "x", "messages": [ASKED, SAID]},
        "prompt",
        "is no turn of the conversations",
    ),
    (
        "text and messages",
        {"prompt": "a", "completion": [SAID]},
        "completion",
        "give both as messages or as text",
    ),
    ("no completion", {"prompt": "a"}, "row", "accepted are"),
    ("an empty completion", {"prompt": "a", "completion": ""}, "completion", "expected some text"),
    ("no output", {"instruction": "a"}, "output", "missing"),
    (
        "input that is a list",
        {"instruction": "a", "input": ["b"], "output": "c"},
        "input",
        "expected a string",
    ),
    (
        "history of threes",
        {"instruction": "a", "output": "c", "history": [["a", "b", "c"]]},
        "history[0]",
        "two strings",
    ),
    (
        "an unknown speaker",
        {"conversations": [{"from": "bing", "value": "a"}]},
        "conversations[0].from",
        "expected one of",
    ),
    ("a turn without value", {"conversations": [{"from": "human"}]}, "conversations[0].value", "missing"),
    (
        "a call that is no JSON",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(2)"}]},
        "conversations[1].value",
        "not JSON",
    ),
    ("row weight 0", {"messages": [ASKED, SAID], "weight": 0}, "weight", "expected a number above 0"),
    (
        "a row weight that float32 rounds to 0",
        {"text": "ab", "weight": 1e-46},
        "weight",
        "expected a number above 0",
    ),
    ("a row weight beyond float32", {"text": "ab", "weight": 1e39}, "weight", "expected a number above 0"),
    ("a row weight of 400 digits", {"text": "ab", "weight": 10**400}, "weight", "expected a number above 0"),
    ("a bad answer of KTO", {"messages": [ASKED, SAID], "label": False}, "label", "marked as a bad one"),
    (
        "a bad completion",
        {"prompt": "a", "completion": "b", "kto_tag": False},
        "kto_tag",
        "marked as a bad one",
    ),
    ("LLaMA-Factory's ranking", {"instruction": "a", "chosen": "b", "rejected": "c"}, "row", "a preference"),
    (
        "another system beside",
        {"messages": [ASKED, SAID], "system": "Be nice."},
        "system",
        "no turn of the conversations",
    ),
    ("a context beside Alpaca", {"instruction": "a", "output": "b", "context": "c"}, "context", "no turn"),
    (
        "functions beside",
        {"messages": [ASKED, SAID], "functions": [{"name": "f"}]},
        "functions",
        "put it into them",
    ),
    ("a question beside a text", {"text": "ab", "question": "c"}, "question", "no turn"),
    (
        "a system beside a prompt",
        {"prompt": [ASKED], "completion": [SAID], "system": "x"},
        "system",
        "no turn",
    ),
    ("two systems", {"system": "x", "conversations": [SYSTEM, ASKED, SAID]}, "system", "no turn"),
    (
        "flags that contradict",
        {"messages": [ASKED, {**SAID, "weight": 1, "train": False}]},
        "messages[1].weight",
        "contradict",
    ),
    ("images", {"messages": [ASKED, SAID], "images": ["a.png"]}, "images", "only text"),
    (
        "tools that the template does not show",
        {"messages": [ASKED, SAID], "tools": TOOLS},
        "tools",
        "shows no tools",
    ),
    (
        "an end of turn inside",
        {"messages": [ASKED, {**SAID, "content": "4<|im_end|>5"}]},
        "messages",
        "which ends a turn",
    ),
]


@pytest.mark.parametrize(("row", "field", "reason"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_row_is_refused_where_and_why(tmp_path: Path, row: Any, field: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(RowError) as caught:
        index_rows(str(path), Renderer(byte_tokenizer()), SFT)
    assert (caught.value.line, caught.value.field) == (2, field)
    assert reason in caught.value.reason


def test_rows_over_the_limit_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b" * n} for n in (3, 9)] + [
        {"prompt": "a" * 20, "completion": "b"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer(byte_tokenizer())
    index = index_rows(str(path), renderer, SFT)
    assert index.kind.made(index.rows, Rendering()) == "3 examples, 16 of 38 tokens learned"
    dropped = select_rows(index, renderer, Rendering(8))
    assert [o.outcome for o in dropped.outcomes()] == ["dropped", "dropped"]
    cut = select_rows(index, renderer, Rendering(8, "response_end"))
    assert [(o.line, o.outcome) for o in cut.outcomes()] == [(2, "shortened"), (3, "dropped")]
    short, shortened = cut.rows.take([0, 1])
    assert short.datum.loss_fn_inputs["weights"].to_numpy().tolist() == [1, 1, 1, 1]
    assert shortened.datum.model_input.length == 7
    assert shortened.datum.loss_fn_inputs["weights"].to_numpy().sum() == 7
    for selected in (dropped, cut):
        selected.close()


def test_the_same_file_has_an_index_for_each_kind_of_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    renderer = Renderer(byte_tokenizer())
    assert len(index_rows(str(path), renderer, SFT).rows) == 1
    with pytest.raises(RowError, match="a supervised row; `firesteel sft` trains on these"):
        index_rows(str(path), renderer, PREFERENCES)
