"""What the data check says of files that can be used, and that runs say the same."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import check, distinct, found, pair, write
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config
from toy_tokenizers import CHATML, LLAMA_3, QWEN_3, byte_tokenizer

from training.recipes.dpo_loop import main
from training.utils.data_check import Check
from training.utils.data_check_text import report_lines
from training.utils.data_figures import Lengths, Share
from training.utils.preference_rows import PREFERENCES, saved_by_sharing
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_kinds import kind_of
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import select_rows
from training.utils.sft_rows import SFT


@pytest.fixture(scope="module", params=["tokens", "characters"])
def renderer(request: pytest.FixtureRequest) -> Renderer | None:
    """The same findings with a tokenizer and without."""
    return Renderer(byte_tokenizer()) if request.param == "tokens" else None


def test_of_rows_without_fault_nothing_is_found(tmp_path: Path, renderer: Renderer | None) -> None:
    report = check(write(tmp_path, distinct(40)), renderer)
    assert report.findings == ()
    assert (report.rows, report.usable, report.lost) == (40, 40, 0)
    assert report.figures is not None
    assert report.figures.prompts == 40
    assert report.figures.longer_is_chosen == Share.of(20, 40)


def test_duplicates_are_found_by_what_they_say_not_by_how_they_are_written(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    rows = [*distinct(4), pair("Question 1?", "no", "yes", id=7), distinct(3)[2]]
    duplicates = found(check(write(tmp_path, rows), renderer))["duplicates"]
    assert (duplicates.level, duplicates.rows, duplicates.lines) == ("warning", 2, (5, 6))


def test_both_sides_of_a_contradiction_are_found(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [*distinct(4), pair("Question 1?", "yes", "no")]
    contradictions = found(check(write(tmp_path, rows), renderer))["contradictions"]
    assert contradictions.lines == (2, 5)
    assert str(contradictions).endswith("preferred the other way round (lines 2, 5)")


def test_the_same_answers_to_another_prompt_are_no_duplicate(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    rows = [pair("a", "yes", "no"), pair("b", "yes", "no"), pair("b", "yes", "na"), pair("c", "no", "yes")]
    assert not {"duplicates", "contradictions"} & found(check(write(tmp_path, rows), renderer)).keys()


def test_ranked_lists_are_repeated_as_a_whole_and_contradicted_by_any_two_answers(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    def ranked(*texts: str) -> dict[str, Any]:
        completions = [{"text": text, "rank": rank} for rank, text in enumerate(texts)]
        return {"prompt": "q", "completions": completions}

    lists = [ranked("a", "b", "c"), ranked("b", "c", "d"), ranked("a", "b", "c"), ranked("d", "e", "b")]
    findings = found(check(write(tmp_path, lists), renderer))
    assert findings["duplicates"].lines == (3,)
    assert findings["contradictions"].lines == (2, 4)


@pytest.mark.parametrize(("longer", "name"), [(0, "length-bias"), (1, "looks-swapped-by-length")])
def test_a_preference_for_length_is_told_where_it_is_sure(
    tmp_path: Path, renderer: Renderer | None, longer: int, name: str
) -> None:
    sides = [("a long answer", "short"), ("short", "a long answer")]
    rows = [pair(f"q{index}", *sides[longer if index % 10 else 1 - longer]) for index in range(40)]
    findings = found(check(write(tmp_path, rows), renderer))
    assert list(findings) == [name]
    assert ("90.0%", "10.0%")[longer] in findings[name].text
    assert not found(check(write(tmp_path, rows[1:6]), renderer))  # of five rows nothing is sure


def test_declining_answers_that_are_preferred_look_swapped(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [pair(f"q{index}", "I'm sorry, but I cannot.", "Of course: yes, sir!") for index in range(12)]
    suspicion = found(check(write(tmp_path, rows), renderer))["looks-swapped-by-refusals"]
    assert suspicion.rows == 12
    assert "look whether chosen and rejected are swapped" in suspicion.text
    turned = [pair(f"q{index}", "Of course: yes, sir!", "I'm sorry, but I cannot.") for index in range(12)]
    assert "looks-swapped-by-refusals" not in found(check(write(tmp_path, turned), renderer))


def test_scores_beside_the_sides_must_agree_with_them(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [row | {"score_chosen": index, "score_rejected": 2} for index, row in enumerate(distinct(4))]
    assert found(check(write(tmp_path, rows), renderer))["scores-contradict"].lines == (1, 2)


def test_leakage_is_told_of_the_held_out_file(tmp_path: Path, renderer: Renderer | None) -> None:
    train = write(tmp_path, distinct(10))
    rows = [
        pair("Question 3?", "other", "words"),
        distinct(5)[4],
        pair("Question 5?", "yes", "no"),
        pair("new", "a", "b"),
    ]
    heldout = write(tmp_path, rows, "heldout.jsonl")
    first, second = Check(renderer).files([train], heldout)
    assert not first.findings
    assert found(second)["held-out-prompts"].lines == (1, 2, 3)
    assert found(second)["held-out-rows"].lines == (2, 3)


def test_what_is_lost_is_counted_by_reason_and_listed_to_a_limit(tmp_path: Path) -> None:
    renderer = Renderer(byte_tokenizer())
    empty = pair("q", "a", "")
    rows = [*distinct(2), *[empty] * 30, pair("q", "a" * 100, "b"), pair("q", "a" * 120, "b")]
    path = write(tmp_path, rows)
    report = check(path, renderer, max_seq_len=90)
    assert [(loss.outcome, loss.rows) for loss in report.losses] == [("refused", 30), ("dropped", 2)]
    assert report.losses[0].lines == (3, 4, 5, 6, 7)
    assert (len(report.listed), report.lost, report.rows, report.usable) == (10, 32, 34, 2)
    assert [finding.level for finding in report.findings] == ["error", "warning"]
    assert [f.level for f in check(path, renderer, max_seq_len=90, on_bad_row="skip").findings] == [
        "warning"
    ] * 2
    (full,) = Check(renderer, PREFERENCES, Rendering(90), list_all=True).files([path])
    assert [row.line for row in full.listed] == list(range(3, 35))
    assert "    and 22 more; --all lists them" in list(report_lines(report))


def reasons(rows: list[Any], tmp_path: Path) -> list[str]:
    return [
        f"{loss.rows} {loss.reason}" for loss in check(write(tmp_path, [*distinct(2), *rows]), None).losses
    ]


def test_a_reason_leaves_out_only_what_differs_between_its_rows(tmp_path: Path) -> None:
    def weighing(*weights: float) -> list[Any]:
        return [pair("q", "yes", "no", weight=weight) for weight in weights]

    expected = "expected a number above 0 (1e-6 to 1e6)"
    assert reasons(weighing(-2.5), tmp_path) == [f"1 weight: the number -2.5; {expected}"]
    assert reasons(weighing(0, 0), tmp_path) == [f"2 weight: the number 0; {expected}"]
    assert reasons(weighing(0, -2.5, 1e300, 0), tmp_path) == [f"4 weight: the number …; {expected}"]


def test_a_quotation_is_left_out_whole_and_another_one_stays(tmp_path: Path) -> None:
    def from_(*roles: str) -> list[Any]:
        return [
            {
                **pair("q", "yes", "no"),
                "prompt": [{"role": role, "content": "q"}, {"role": "user", "content": "r"}],
            }
            for role in roles
        ]

    (one,) = reasons(from_('a "b" c'), tmp_path)
    assert 'prompt[0].role: the string "a \\"b\\" c"; expected' in one
    (two,) = reasons(from_('a "b" c', "d 1"), tmp_path)
    assert two == one.replace("1 ", "2 ", 1).replace('"a \\"b\\" c"', '"…"')


def test_the_limit_of_rows_that_are_too_long_is_told(tmp_path: Path) -> None:
    rows = [*distinct(1), pair("q", "a" * 100, "b"), pair("q", "a" * 2000, "b")]
    (loss,) = check(write(tmp_path, rows), Renderer(byte_tokenizer()), max_seq_len=90).losses
    assert loss.reason == "chosen has … tokens, more than max_seq_len 90"


def test_rows_that_are_the_same_once_cut_are_told_so(tmp_path: Path) -> None:
    rows = [*distinct(2), pair("q", "a" * 100 + "b", "a" * 100 + "c")]
    report = check(write(tmp_path, rows), Renderer(byte_tokenizer()), max_seq_len=60, truncate="response_end")
    assert [(row.line, row.outcome) for row in report.listed] == [(3, "dropped")]
    assert "after shortening: the same 60 tokens as chosen" in report.listed[0].reason


@pytest.mark.parametrize(
    ("template", "answer", "name"),
    [
        (CHATML, "yes <|start|> no", "special-tokens-in-text"),
        (LLAMA_3 + "{#two#}", "<s>", "special-tokens-in-text"),
        ("{{ bos_token }}" + LLAMA_3, "yes", "doubled-start"),
    ],
    ids=["special token", "beginning of sequence", "two beginnings"],
)
def test_what_the_template_does_to_rows_is_told(
    tmp_path: Path, template: str, answer: str, name: str
) -> None:
    tokenizer = byte_tokenizer(template)
    tokenizer.bos_token = "<s>"
    report = check(write(tmp_path, [pair("q", answer, "no, not at all")]), Renderer(tokenizer))
    assert name in found(report)


def test_reasoning_of_earlier_turns_is_only_noted(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>why</think>a"},
        {"role": "user", "content": "r"},
    ]
    row = {**pair("", "<think>so</think>b", "<think>no</think>c"), "prompt": turns}
    findings = found(check(write(tmp_path, [row]), Renderer(byte_tokenizer(QWEN_3))))
    assert findings["earlier-reasoning-left-out"].level == "note"


def test_reasoning_of_an_answer_that_the_template_leaves_out_is_an_error(tmp_path: Path) -> None:
    template = CHATML.replace("message.content", "message.content.split('</think>')[-1]")
    rows = [pair("q", "<think>so</think>yes", "no"), pair("r", "yes", "no")]
    report = check(write(tmp_path, rows), Renderer(byte_tokenizer(template)))
    assert found(report)["refused"].level == "error"
    assert "leaves out the start of turn 1" in report.listed[0].reason


def test_supervised_rows_are_known_as_such(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n % 3}"}, {"role": "assistant", "content": "a"}]}
        for n in range(4)
    ]
    path = write(tmp_path, rows)
    assert kind_of([path]) is SFT
    report = check(path, renderer)
    assert found(report)["duplicates"].lines == (4,)
    assert report.figures is not None
    assert report.figures.longer_is_chosen is None
    assert list(report.figures.lengths) == ["prompt", "rest", "learned"]


@pytest.mark.parametrize("less", [0, 1, 2, 6, 30])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_tokens_that_are_learned_are_those_left_after_the_cut_or_are_said_to_be_before_it(
    tmp_path: Path, turns: int, less: int
) -> None:
    """Which tokens are learned is not kept: where some between them are not, it is not known how many a cut leaves."""
    said = {"role": "assistant", "content": "an answer " * 5}
    rows = [{"messages": [{"role": "user", "content": "q" * (1 + n)}, said] * turns} for n in range(3)]
    path, renderer = write(tmp_path, rows), Renderer(byte_tokenizer())
    index = index_rows(path, renderer, SFT)
    longest = int(index.rows["tokens"].max()) - less
    with closing(select_rows(index, renderer, Rendering(longest, "response_end"))) as selected:
        items = selected.rows.take(range(3))
    figures = check(path, renderer, max_seq_len=longest, truncate="response_end").figures
    assert figures is not None
    *_, (name, learned) = figures.lengths.items()
    assert any(item.truncated for item in items) == (less > 0)
    if less and turns > 1:
        assert name == "learned, before the cut"
        assert learned == Lengths.of(index.rows["learned"].astype(np.int64))
    else:
        assert name == "learned"
        left = [np.count_nonzero(item.datum.loss_fn_inputs["weights"].to_numpy()) for item in items]
        assert learned == Lengths.of(np.array(left))


def test_a_long_name_keeps_the_columns_under_each_other(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]
    path = write(tmp_path, [{"messages": turn * 2}])
    report = check(path, Renderer(byte_tokenizer()), max_seq_len=50, truncate="response_end")
    _, head, *table = list(report_lines(report))[:5]
    assert table[2].startswith("  learned, before the cut ")
    assert {len(line) for line in (head, *table)} == {len(head)}


def test_a_run_says_what_the_check_warns_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, [*distinct(4), distinct(1)[0]], "repeated.jsonl")
    main(config(tmp_path, batch_size=4).model_copy(update={"dataset": path}))
    report = check(path, Renderer.load("tiny-llama"))
    said = capsys.readouterr().out
    assert [f"warning: {path}: {finding}" for finding in report.findings] == [
        line for line in said.splitlines() if line.startswith("warning: ")
    ]
    assert len(report.findings) == 1


# Figures


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    figures = Lengths.of(np.array(lengths))
    assert sum(each.rows for each in figures.bins) == len(lengths)
    before = -1
    for each in figures.bins:
        assert each.rows == sum(before < length <= each.up_to for length in lengths) or before == -1
        before = each.up_to
    assert (figures.minimum, figures.maximum) == (min(lengths), max(lengths))
    assert figures.bins[-1].up_to >= figures.maximum


def test_a_share_is_surer_of_more_rows() -> None:
    few, many = Share.of(6, 10), Share.of(600, 1000)
    assert few.low < many.low < 0.6 < many.high < few.high
    # Wilson's interval of 6 out of 10, as textbooks have it.
    assert (round(few.low, 4), round(few.high, 4)) == (0.3127, 0.8318)
    assert math.isnan(Share.of(0, 0).share)


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=6), min_size=2, max_size=6, unique=True))
def test_what_is_saved_is_the_difference_to_a_tree(answers: list[str]) -> None:
    tree = {text[: end + 1] for text in answers for end in range(len(text))}
    assert sum(map(len, answers)) - saved_by_sharing(answers) == len(tree)
