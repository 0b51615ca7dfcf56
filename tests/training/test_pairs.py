import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_tokenizers import QWEN_3, byte_tokenizer

from firesteel.sdk.errors import ConfigError, DataError, RowError
from firesteel.sdk.types import Datum, ModelInput, TensorData
from training.utils.pairs import (
    PreferencePair,
    build_dpo_datums,
    render_pairs,
)
from training.utils.preference_data import PreferenceFile, read_preferences
from training.utils.rendering import Renderer
from training.utils.row_outcomes import Rendering, RowCounts, RowOutcome, write_row_outcomes

PROMPT_TOKENS = 22  # of `row` below, template included


def row(chosen: str, rejected: str) -> dict[str, Any]:
    user = {"role": "user", "content": "Ask"}
    return {
        "chosen": {"messages": [user, {"role": "assistant", "content": chosen}]},
        "rejected": {"messages": [user, {"role": "assistant", "content": rejected}]},
    }


def read(folder: Path, *rows: dict[str, Any], on_bad_row: Any = "fail") -> PreferenceFile:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(content) for content in rows), encoding="utf-8")
    return read_preferences(path, on_bad_row)


def weights(datum: Datum) -> list[float]:
    return datum.loss_fn_inputs["weights"].data


def sequence(datum: Datum) -> list[int]:
    return [*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].data[-1]]


@pytest.fixture
def renderer() -> Renderer:
    return Renderer(byte_tokenizer())


# Build_dpo_datums


def test_a_datum_is_its_sequence_shifted_by_one_with_weights_from_the_first_response_token() -> None:
    chosen, rejected = build_dpo_datums([1, 2, 3, 4, 5], [1, 2, 6], 2)

    assert chosen.model_input.to_ints() == [1, 2, 3, 4]
    assert chosen.loss_fn_inputs["target_tokens"].data == [2, 3, 4, 5]
    assert weights(chosen) == [0, 1, 1, 1]
    assert rejected.model_input.to_ints() == [1, 2]
    assert rejected.loss_fn_inputs["target_tokens"].data == [2, 6]
    assert weights(rejected) == [0, 1]
    assert chosen.loss_fn_inputs["target_tokens"].dtype == "int64"
    assert chosen.loss_fn_inputs["weights"].dtype == "float32"


def test_a_prompt_of_one_token_leaves_no_target_without_weight() -> None:
    chosen, rejected = build_dpo_datums([7, 1], [7, 2], 1)
    assert (weights(chosen), weights(rejected)) == ([1], [1])


def test_arrays_of_ids_are_accepted_as_lists_are() -> None:
    chosen, _ = build_dpo_datums(np.array([1, 2, 3]), np.array([1, 2, 4]), 2)  # type: ignore[arg-type]
    assert sequence(chosen) == [1, 2, 3]


tokens = st.lists(st.integers(0, 5), max_size=12)


@given(prompt=st.lists(st.integers(0, 5), min_size=1, max_size=12), chosen=tokens, rejected=tokens)
def test_weights_count_exactly_the_response_tokens(
    prompt: list[int], chosen: list[int], rejected: list[int]
) -> None:
    if not chosen or not rejected or chosen == rejected:
        with pytest.raises(DataError):
            build_dpo_datums(prompt + chosen, prompt + rejected, len(prompt))
        return
    for datum, response in zip(
        build_dpo_datums(prompt + chosen, prompt + rejected, len(prompt)), (chosen, rejected), strict=True
    ):
        assert sequence(datum) == prompt + response
        assert weights(datum) == [0.0] * (len(prompt) - 1) + [1.0] * len(response)


@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    chosen=tokens,
    rejected=tokens,
    limit=st.integers(2, 30),
)
def test_shortening_keeps_the_prompt_and_invents_nothing(
    prompt: list[int], chosen: list[int], rejected: list[int], limit: int
) -> None:
    wholes = [prompt + chosen, prompt + rejected]
    cut = [whole[:limit] for whole in wholes]
    usable = cut[0] != cut[1] and min(len(side) for side in cut) > len(prompt)
    if not usable:
        with pytest.raises(DataError):
            build_dpo_datums(*wholes, len(prompt), limit, truncate="response_end")
        return
    datums = build_dpo_datums(*wholes, len(prompt), limit, truncate="response_end")
    assert [sequence(datum) for datum in datums] == cut
    assert all(sequence(datum)[: len(prompt)] == prompt for datum in datums)
    PreferencePair(*datums, len(prompt), line=1)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_len", "reason"),
    [
        ([1, 2, 3], [1, 2, 4], 0, "prompt_len: 0; expected a whole number of tokens: the first"),
        ([1, 2, 3], [1, 2, 4], 1.5, "prompt_len: 1.5; expected a whole number"),
        ([1, 2, 3], [1, 2, 4], -1, "prompt_len: -1; "),
        ([1, 2, 3], [1, 9, 4], 2, "token 1 is 2 in chosen and 9 in rejected"),
        ([1, 2], [1, 2, 4], 2, "chosen: an empty response: 2 tokens, of which 2 are the prompt"),
        ([1, 2, 3], [1], 2, "rejected: an empty response: 1 tokens, of which 2 are the prompt"),
        ([1, 2, 3], [1, 2, 3], 2, "rejected: the same 3 tokens as chosen"),
        ([1, 2, -3], [1, 2, 3], 2, "chosen_tokens: -3 is not a token id"),
        ([1, 2, 3], [1, 2, 3.5], 2, "rejected_tokens: expected token ids"),
        ([], [], 1, "chosen: an empty response: 0 tokens"),
    ],
)
def test_what_is_no_pair_is_refused(chosen: Any, rejected: Any, prompt_len: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        build_dpo_datums(chosen, rejected, prompt_len)
    assert reason in str(caught.value)


def test_a_side_over_the_limit_is_refused_with_its_length() -> None:
    with pytest.raises(DataError, match="rejected has 5 tokens, more than max_seq_len 4") as caught:
        build_dpo_datums([1, 2, 3], [1, 2, 3, 4, 5], 1, max_seq_len=4)
    assert 'truncate="response_end"' in str(caught.value)
    assert len(build_dpo_datums([1, 2, 3], [1, 2, 3, 4, 5], 1, max_seq_len=5)) == 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_len", "reason"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 5], 1, "after shortening: the same 3 tokens"),
        ([1, 2, 3, 4], [1, 2, 3, 5], 3, "prompt: its 3 tokens leave no room for a response"),
    ],
)
def test_a_pair_that_shortening_destroys_is_refused(
    chosen: list[int], rejected: list[int], prompt_len: int, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        build_dpo_datums(chosen, rejected, prompt_len, 3, truncate="response_end")


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="truncate: 'keep_end'"):
        build_dpo_datums([1, 2], [1, 3], 1, truncate="keep_end")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_seq_len: 1; expected a whole number of tokens, at least 2"):
        build_dpo_datums([1, 2], [1, 3], 1, max_seq_len=1)


# PreferencePair


def datum(inputs: list[int], targets: list[int], scored: list[float]) -> Datum:
    return Datum(
        ModelInput.from_ints(inputs),
        {"target_tokens": TensorData(targets, "int64"), "weights": TensorData(scored, "float32")},
    )


def test_a_pair_counts_the_tokens_of_both_whole_sequences() -> None:
    assert PreferencePair(*build_dpo_datums([1, 2, 3, 4, 5], [1, 2, 6], 2), 2, line=1).tokens == 8


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (datum([1, 2], [2, 3], [0, 1]), "rejected: the same 3 tokens as chosen"),
        (datum([1, 9], [9, 4], [0, 1]), "token 1 is 2 in chosen and 9 in rejected"),
        (datum([1], [2], [0]), "rejected: an empty response"),
        (datum([1, 2], [2, 4], [0, 0]), "rejected: no token of the response is scored"),
        (datum([1, 2], [2, 4], [1, 1]), "rejected: a token of the prompt"),
        (
            datum([1, 2], [7, 4], [0, 1]),
            "rejected.target_tokens: not the tokens of model_input shifted by one",
        ),
        (datum([1, 2], [2, 4, 5], [0, 1]), "rejected.target_tokens: not the tokens"),
        (datum([1, 2], [2, 4], [0, 1, 1]), "rejected.weights: 3 weights for 2 targets"),
        (Datum(ModelInput.from_ints([1, 2])), "rejected.loss_fn_inputs: target_tokens is missing"),
    ],
)
def test_an_illegal_pair_cannot_be_built(rejected: Datum, reason: str) -> None:
    chosen = datum([1, 2], [2, 3], [0, 1])
    with pytest.raises(DataError) as caught:
        PreferencePair(chosen, rejected, 2, line=1)
    assert reason in str(caught.value)


# Render_pairs


def test_each_row_becomes_a_pair_in_the_order_of_the_file(tmp_path: Path, renderer: Renderer) -> None:
    rendered = render_pairs(read(tmp_path, row("ab", "c"), row("d", "e")), renderer)

    assert rendered.dropped == ()
    assert [(pair.line, pair.prompt_len) for pair in rendered.pairs] == [
        (1, PROMPT_TOKENS),
        (2, PROMPT_TOKENS),
    ]
    assert weights(rendered.pairs[0].chosen) == [0.0] * (PROMPT_TOKENS - 1) + [1.0] * 3
    assert renderer.tokenizer.decode(sequence(rendered.pairs[0].rejected)[PROMPT_TOKENS:]) == "c<|im_end|>"


def test_masks_of_several_turns_reach_the_weights(tmp_path: Path, renderer: Renderer) -> None:
    later = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "z"}]
    conversation = row("ab", "c")
    for side in conversation.values():
        side["messages"] += later

    (pair,) = render_pairs(read(tmp_path, conversation), renderer).pairs

    between = len("\n") + len(["<|im_start|>"]) + len("user\n?") + 1 + len("\n") + 1 + len("assistant\n")
    assert weights(pair.chosen) == [0.0] * (PROMPT_TOKENS - 1) + [1.0] * 3 + [0.0] * between + [1.0] * 2


def test_an_unscored_opening_on_one_side_reaches_the_weights(tmp_path: Path) -> None:
    renderer = Renderer(byte_tokenizer(QWEN_3))
    (pair,) = render_pairs(read(tmp_path, row("<think>\nHm\n</think>\n\na", "b")), renderer).pairs
    assert weights(pair.rejected) == [0.0] * (PROMPT_TOKENS - 1) + [0.0] * len("[\n\n]\n\n") + [1.0] * 2
    assert weights(pair.chosen)[PROMPT_TOKENS - 1] == 1


def test_rows_over_the_limit_are_dropped_and_listed(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "b"), row("long answer", "b"), row("c", "d"))

    rendered = render_pairs(file, renderer, Rendering(max_seq_len=PROMPT_TOKENS + 4))

    assert [pair.line for pair in rendered.pairs] == [1, 3]
    assert rendered.dropped == (RowOutcome(2, "dropped", "chosen has 34 tokens, more than max_seq_len 26"),)


def test_rows_over_the_limit_are_shortened_where_asked_and_dropped_where_nothing_is_left(
    tmp_path: Path, renderer: Renderer
) -> None:
    file = read(tmp_path, row("long answer", "b"), row("same at first", "same"), row("a", "b"))

    rendered = render_pairs(file, renderer, Rendering(max_seq_len=PROMPT_TOKENS + 4, truncate="response_end"))

    assert [(pair.line, pair.truncated) for pair in rendered.pairs] == [(1, True), (3, False)]
    assert renderer.tokenizer.decode(sequence(rendered.pairs[0].chosen)[PROMPT_TOKENS:]) == "long"
    assert [(row.line, row.outcome) for row in rendered.dropped] == [(1, "shortened"), (2, "dropped")]
    assert "after shortening: the same 26 tokens" in rendered.dropped[1].reason


def test_of_a_ranked_list_those_pairs_are_truncated_whose_answers_are(
    tmp_path: Path, renderer: Renderer
) -> None:
    answers = {"prompt": [{"role": "user", "content": "Ask"}], "completions": ["long answer", "b", "a"]}
    file = read(tmp_path, answers | {"scores": [3, 2, 1], "source": "forum"})
    rendered = render_pairs(file, renderer, Rendering(max_seq_len=PROMPT_TOKENS + 4, truncate="response_end"))
    assert [(pair.ranked.better, pair.truncated) for pair in rendered.pairs] == [
        (0, True),
        (0, True),
        (1, False),
    ]
    assert {pair.source for pair in rendered.pairs} == {"forum"}


def test_a_prompt_over_the_limit_is_dropped_even_when_shortening(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match=f"prompt: its {PROMPT_TOKENS} tokens leave no room"):
        render_pairs(
            read(tmp_path, row("a", "b")), renderer, Rendering(max_seq_len=20, truncate="response_end")
        )


def test_bad_rows_of_reader_and_renderer_stand_in_one_list(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "<|im_end|>"), row("a", "a"), row("a", "b"), on_bad_row="skip")

    rendered = render_pairs(file, renderer, Rendering(on_bad_row="skip"))

    assert [pair.line for pair in rendered.pairs] == [3]
    assert [(row.line, row.outcome) for row in rendered.dropped] == [(1, "refused"), (2, "refused")]
    assert rendered.dropped[0].reason.startswith("rejected: the response contains <|im_end|>")
    assert rendered.dropped[1].reason.startswith("rejected.messages[1]: chosen and rejected are identical")


def test_a_row_that_cannot_be_rendered_fails_with_file_and_line(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "b"), row("a", "<|im_end|>"))
    with pytest.raises(RowError) as caught:
        render_pairs(file, renderer)
    assert str(caught.value).startswith(f"{file.path}:2: rejected: the response contains <|im_end|>")


def test_all_rows_that_cannot_be_rendered_are_told_at_once(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "b"), row("a", "<|im_end|>"), row("<|im_end|>", "b"))
    with pytest.raises(DataError, match=r"2 rows cannot be used:\n.*:2: rejected.*\n.*:3: chosen"):
        render_pairs(file, renderer)


def test_responses_that_become_the_same_tokens_are_refused(tmp_path: Path) -> None:
    trimming = byte_tokenizer(QWEN_3)  # this template drops line ends before the content
    with pytest.raises(RowError, match="the same 30 tokens as chosen"):
        render_pairs(read(tmp_path, row("a", "\na")), Renderer(trimming))


def test_max_pairs_counts_pairs_not_rows(tmp_path: Path, renderer: Renderer) -> None:
    rows = [row("a", "a"), row("a", "b"), row("c", "<|im_end|>"), row("c", "d"), row("e", "f")]
    file = read(tmp_path, *rows, on_bad_row="skip")
    rendered = render_pairs(file, renderer, Rendering(on_bad_row="skip"), max_pairs=2)
    assert [pair.line for pair in rendered.pairs] == [2, 4]
    assert rendered.summary.endswith("2 pairs; 2 refused, 1 not used (max_pairs)")


def test_where_no_pair_is_left_the_error_counts_the_reasons(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "a"), row("a", "b"), row("c", "d"), on_bad_row="skip")
    with pytest.raises(DataError, match="no pair is left of 3 rows: 1 refused, 2 dropped") as caught:
        render_pairs(file, renderer, Rendering(max_seq_len=10, on_bad_row="skip"))
    assert "line 2: chosen has 24 tokens and rejected has 24 tokens, more than max_seq_len 10" in str(
        caught.value
    )


def test_settings_of_rendering_are_checked_before_any_work(tmp_path: Path, renderer: Renderer) -> None:
    file = read(tmp_path, row("a", "b"))
    with pytest.raises(ConfigError, match="truncate: 'keep_start'"):
        render_pairs(file, renderer, Rendering(truncate="keep_start"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_pairs: 0"):
        render_pairs(file, renderer, max_pairs=0)
    with pytest.raises(ConfigError, match="max_seq_len: 0"):
        render_pairs(file, renderer, Rendering(max_seq_len=0))


def test_outcomes_are_written_one_json_object_a_row(tmp_path: Path) -> None:
    outcomes = [RowOutcome(3, "dropped", "too long — “x”"), RowOutcome(5, "refused", "rejected: empty")]
    path = tmp_path / "bad_rows.jsonl"

    write_row_outcomes(path, "pairs.jsonl", outcomes)

    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"file": "pairs.jsonl", "line": 3, "outcome": "dropped", "reason": "too long — “x”"},
        {"file": "pairs.jsonl", "line": 5, "outcome": "refused", "reason": "rejected: empty"},
    ]
    write_row_outcomes(path, "heldout.jsonl", [RowOutcome(1, "dropped", "too long")])
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == [
        "pairs.jsonl",
        "pairs.jsonl",
        "heldout.jsonl",
    ]


def test_nothing_lost_is_an_empty_file(tmp_path: Path) -> None:
    write_row_outcomes(tmp_path / "bad_rows.jsonl", "pairs.jsonl", [])
    assert (tmp_path / "bad_rows.jsonl").read_text() == ""


def test_one_row_is_told_as_one() -> None:
    counts = RowCounts(1, {"dropped": 1}, 0)
    assert counts.summary("x", "text", "0 pairs") == "x: 1 row of the form text: 0 pairs; 1 dropped"
    assert str(counts.nothing_left("x", [])).startswith("x: no pair is left of 1 row: 1 dropped")
