"""What rows of several files have to do with each other, and what of it is told."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import check, distinct, found, pair, write
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_tokenizer

from training.utils import row_comparison
from training.utils.data_check import Check, FileReport
from training.utils.data_comparison import across_files, leakage
from training.utils.data_findings import Counterpart, DataFinding
from training.utils.jsonl import LocatedRow
from training.utils.preference_rows import PREFERENCES
from training.utils.rendering import Renderer
from training.utils.row_check import check_rows, read_in_characters
from training.utils.row_kinds import kind_of
from training.utils.row_records import RANKED, KeptRows
from training.utils.sft_rows import SFT

RENDERER = Renderer(byte_tokenizer())


@pytest.fixture(params=["tokens", "characters"])
def renderer(request: pytest.FixtureRequest) -> Renderer | None:
    """The same findings with a tokenizer and without."""
    return RENDERER if request.param == "tokens" else None


def ranked(prompt: str, answers: str, ranks: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A list whose answers are letters, the best first unless ranks are given."""
    said = [[{"role": "assistant", "content": text}] for text in answers]
    asked = [{"role": "user", "content": prompt}]
    return {"prompt": asked, "completions": said, "ranks": list(ranks or range(len(answers)))}


def reports(renderer: Renderer | None, *paths: str, heldout: str | None = None) -> list[FileReport]:
    return Check(renderer, kind_of(paths)).files(paths, heldout)


def across(report: FileReport) -> list[tuple[str, str, int, list[tuple[int, int]]]]:
    """Each finding about another file: its name, the file, how many rows, and the lines here and there."""
    return [
        (
            finding.name.removesuffix("-across-files"),
            Path(finding.counterparts[0].path).name,
            finding.rows,
            [(row.line, row.other_line) for row in finding.counterparts],
        )
        for finding in report.findings
        if finding.counterparts
    ]


# Rows that are there before


def test_rows_of_an_earlier_file_are_told_with_both_lines(tmp_path: Path, renderer: Renderer | None) -> None:
    first = write(tmp_path, distinct(6), "first.jsonl")
    rows = [*[pair(f"new {n}", "yes", "no") for n in range(3)], distinct(6)[4], distinct(6)[1]]
    before, after = reports(renderer, first, write(tmp_path, rows, "second.jsonl"))
    assert before.findings == ()
    (finding,) = after.findings
    assert finding == DataFinding(
        "warning",
        "duplicates-across-files",
        f"2 rows stand in {first} too, token for token",
        2,
        (4, 5),
        (Counterpart(4, first, 5), Counterpart(5, first, 2)),
    )
    assert str(finding).endswith("too, token for token (lines 4, 5; there 5, 2)")


def test_of_many_rows_the_first_few_are_named(tmp_path: Path) -> None:
    paths = [write(tmp_path, distinct(9), name) for name in ("a.jsonl", "b.jsonl")]
    (finding,) = reports(None, *paths)[1].findings
    assert str(finding).endswith("(lines 1, 2, 3, 4, 5 and 4 more; there 1, 2, 3, 4, 5)")


def test_a_row_of_three_files_is_told_of_the_second_and_the_third_as_standing_in_the_first(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    paths = [
        write(tmp_path, [pair(f"of {name}", "yes", "no"), distinct(1)[0]], f"{name}.jsonl") for name in "abc"
    ]
    told = [across(report) for report in reports(renderer, *paths)]
    assert told == [[], *[[("duplicates", "a.jsonl", 1, [(2, 2)])]] * 2]


def test_a_row_that_is_twice_in_a_file_is_told_once_for_each_file(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    paths = [write(tmp_path, distinct(2) * 2, name) for name in ("a.jsonl", "b.jsonl")]
    first, second = reports(renderer, *paths)
    assert [finding.name for finding in first.findings] == ["duplicates"]
    assert found(second)["duplicates"].lines == (3, 4)
    assert across(second) == [("duplicates", "a.jsonl", 2, [(1, 1), (2, 2)])]


def test_files_of_other_forms_are_compared_by_what_they_say(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    asked, yes, no = distinct(1)[0].values()
    whole = {"chosen": {"messages": [*asked, *yes]}, "rejected": {"messages": [*asked, *no]}}
    apart = {"input": {"messages": asked}, "preferred_output": no, "non_preferred_output": yes}
    paths = [
        write(tmp_path, rows, name)
        for rows, name in ((distinct(1), "a.jsonl"), ([whole], "b.jsonl"), ([apart], "c.jsonl"))
    ]
    told = [across(report) for report in reports(renderer, *paths)[1:]]
    assert told == [[("duplicates", "a.jsonl", 1, [(1, 1)])], [("contradictions", "a.jsonl", 1, [(1, 1)])]]


def test_supervised_files_are_compared_too(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]
    paths = [write(tmp_path, rows[:3], "a.jsonl"), write(tmp_path, rows[2:], "b.jsonl")]
    assert across(reports(renderer, *paths)[1]) == [("duplicates", "a.jsonl", 1, [(1, 3)])]


def test_a_file_that_cannot_be_used_is_compared_with_nothing(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    good = [write(tmp_path, distinct(2), name) for name in ("a.jsonl", "c.jsonl")]
    broken = tmp_path / "b.jsonl"
    broken.write_text("no json\n")
    _, second, third = reports(renderer, good[0], str(broken), good[1])
    assert [finding.level for finding in second.findings] == ["error"]
    assert across(third) == [("duplicates", "a.jsonl", 2, [(1, 1), (2, 2)])]


# Contradictions


def test_a_contradiction_of_two_files_is_told_of_the_later_one(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    first = write(tmp_path, distinct(4), "a.jsonl")
    rows = [
        pair("Question 9?", "yes", "no"),
        pair("Question 1?", "yes", "no"),
        pair("Question 0?", "no", "yes"),
    ]
    before, after = reports(renderer, first, write(tmp_path, rows, "b.jsonl"))
    assert before.findings == ()
    assert across(after) == [("contradictions", "a.jsonl", 2, [(2, 2), (3, 1)])]
    assert "the same prompt and answers, preferred the other way round (lines 2, 3; there 2, 1)" in str(
        after.findings[0]
    )


def test_a_contradiction_inside_a_file_is_not_told_again(tmp_path: Path, renderer: Renderer | None) -> None:
    both = [pair("q", "yes", "no"), pair("q", "no", "yes")]
    paths = [write(tmp_path, distinct(2), "a.jsonl"), write(tmp_path, both, "b.jsonl")]
    (finding,) = reports(renderer, *paths)[1].findings
    assert (finding.name, finding.lines) == ("contradictions", (1, 2))


def test_a_ranked_list_and_a_pair_can_contradict_each_other(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    paths = [
        write(tmp_path, [ranked("p", "abcd"), ranked("q", "abcd")], "lists.jsonl"),
        write(tmp_path, [pair("p", "a", "c"), pair("q", "d", "b"), pair("r", "d", "b")], "pairs.jsonl"),
        write(tmp_path, [ranked("p", "xyzc"), ranked("q", "xdya")], "more.jsonl"),
    ]
    told = [across(report) for report in reports(renderer, *paths)]
    assert told == [
        [],
        [("contradictions", "lists.jsonl", 1, [(2, 2)])],
        [("contradictions", "lists.jsonl", 1, [(2, 2)])],
    ]


def test_tied_answers_contradict_nothing(tmp_path: Path, renderer: Renderer | None) -> None:
    rows = [ranked("q", "abc", (1, 1, 2)), ranked("q", "bad"), ranked("q", "dab", (1, 2, 2))]
    findings = found(check(write(tmp_path, rows), renderer))
    assert findings["contradictions"].lines == (2, 3)  # of b and d


def test_a_list_that_prefers_an_answer_to_itself_is_refused_without_a_tokenizer_too(
    tmp_path: Path, renderer: Renderer | None
) -> None:
    report = check(write(tmp_path, [ranked("q", "aba"), ranked("q", "aab", (1, 1, 2))]), renderer)
    assert [(row.line, row.outcome) for row in report.listed] == [(1, "refused")]
    assert "answer 3: the same" in report.listed[0].reason
    assert "contradictions" not in found(report)


# The two together, against comparing every row with every other


Rows = list[dict[str, Any]]


@st.composite
def rows_of_a_file(draw: st.DrawFn) -> Rows:
    """Few prompts and answers, so that much is the same."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from("pq"))
        answers = "".join(draw(st.permutations("abcd"))[: draw(st.integers(2, 4))])
        ranks = tuple(draw(st.sampled_from([0, 1])) + 2 * place for place in range(len(answers)))
        tied = tuple(sorted(rank // draw(st.sampled_from([1, 2])) for rank in ranks))
        rows.append(ranked(prompt, answers, tied if len(set(tied)) > 1 else None))
        if len(answers) == 2 and draw(st.booleans()):
            rows[-1] = pair(prompt, *answers)
    return rows


def kept(rows: Rows, path: str, renderer: Renderer | None) -> KeptRows:
    located = [LocatedRow(line, 0, json.dumps(row).encode()) for line, row in enumerate(rows, start=1)]
    read = (
        check_rows(located, renderer, PREFERENCES) if renderer else read_in_characters(located, PREFERENCES)
    )
    assert not read.refused
    return KeptRows(path, read.usable, read.ranked)


def said(row: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Prompt, better answer, worse answer."""
    prompt = row["prompt"][0]["content"]
    if "chosen" in row:
        return {(prompt, row["chosen"][0]["content"], row["rejected"][0]["content"])}
    answers = [answer[0]["content"] for answer in row["completions"]]
    twos = combinations(zip(row["ranks"], answers, strict=True), 2)
    return {(prompt, one, other) for (rank, one), (worse, other) in twos if rank < worse}


def contradict(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return any((prompt, worse, better) in said(other) for prompt, better, worse in said(one))


def content(row: dict[str, Any]) -> tuple[str, ...]:
    both = "chosen" in row
    answers = [row["chosen"], row["rejected"]] if both else row["completions"]
    return (row["prompt"][0]["content"], *(answer[0]["content"] for answer in answers))


@settings(deadline=None, max_examples=80)
@given(
    st.lists(rows_of_a_file(), min_size=1, max_size=4),
    st.sampled_from([RENDERER, None]),
    st.sampled_from([1, 3, 2**20]),
)
def test_what_is_told_is_what_comparing_every_row_with_every_other_finds(
    contents: list[Rows], renderer: Renderer | None, at_once: int
) -> None:
    files = [kept(rows, str(number), renderer) for number, rows in enumerate(contents)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_comparison, "_PREFERENCES_AT_ONCE", at_once)
        inside = [{finding.name: finding for finding in PREFERENCES.findings(rows)} for rows in files]
        between = across_files(files)
    every = [row for rows in contents for row in rows]
    repeats = [findings["duplicates"].rows for findings in inside if "duplicates" in findings]
    repeats += [f.rows for findings in between for f in findings if f.name == "duplicates-across-files"]
    assert sum(repeats) == len(every) - len({content(row) for row in every})
    for number, rows in enumerate(contents):
        own = sum(any(contradict(row, other) for other in rows) for row in rows)
        assert (inside[number]["contradictions"].rows if own else 0) == own
        assert ("contradictions" in inside[number]) == bool(own)
        earlier = [row for before in contents[:number] for row in before]
        against = sum(any(contradict(row, other) for other in earlier) for row in rows)
        told = [f for f in between[number] if f.name == "contradictions-across-files"]
        assert sum(finding.rows for finding in told) == against
    for finding in (finding for findings in between for finding in findings):
        compare = (
            contradict if finding.name.startswith("contradictions") else lambda a, b: content(a) == content(b)
        )
        number = next(number for number, findings in enumerate(between) if finding in findings)
        for row in finding.counterparts:
            assert int(row.path) < number
            assert compare(contents[number][row.line - 1], contents[int(row.path)][row.other_line - 1])


def test_prompt_and_answer_that_change_places_are_another_row(renderer: Renderer | None) -> None:
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "b", "chosen": "a", "rejected": "c"}]
    rows = [LocatedRow(1, 0, json.dumps(row).encode()) for row in texts]
    files = [
        KeptRows(str(n), (read := read_in_characters([row], PREFERENCES)).usable, read.ranked)
        for n, row in enumerate(rows)
    ]
    assert across_files(files) == [[], []]


def test_of_a_ranked_list_18_bytes_an_answer_are_kept_and_of_a_pair_none() -> None:
    assert RANKED.itemsize == 18
    rows = kept([ranked("p", "abcd"), pair("p", "a", "b"), ranked("q", "ab")], "a", None)
    assert len(rows.ranked) == 4


# The held-out file


def test_leakage_names_each_file_that_trains_on_it(tmp_path: Path, renderer: Renderer | None) -> None:
    paths = [write(tmp_path, distinct(4)[start:], f"{start}.jsonl") for start in (0, 2)]
    rows = [pair("Question 3?", "yes", "no"), pair("new", "a", "b"), distinct(1)[0]]
    *_, report = reports(renderer, *paths, heldout=write(tmp_path, rows, "heldout.jsonl"))
    assert across(report) == [
        ("held-out-prompts", "0.jsonl", 2, [(1, 4), (3, 1)]),
        ("held-out-rows", "0.jsonl", 2, [(1, 4), (3, 1)]),
        ("held-out-prompts", "2.jsonl", 1, [(1, 2)]),
        ("held-out-rows", "2.jsonl", 1, [(1, 2)]),
    ]
    assert "1 held-out row has a prompt that is trained on, in" in report.findings[2].text
    assert "1 held-out row is among the training rows of " in report.findings[3].text


def test_nothing_leaks_between_files_without_rows_in_common() -> None:
    ours, theirs = (kept([pair(prompt, "a", "b")], prompt, None) for prompt in "pq")
    nothing = ours.at(np.zeros(1, np.bool_))
    assert list(leakage(ours, theirs)) == list(leakage(ours, nothing)) == list(leakage(nothing, ours)) == []


# Files of two kinds


@pytest.mark.parametrize("first", ["preferences", "supervised rows"])
def test_a_file_of_another_kind_is_one_error_not_one_for_each_row(
    tmp_path: Path, renderer: Renderer | None, first: str
) -> None:
    supervised = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    paths = [write(tmp_path, distinct(40), "a.jsonl"), write(tmp_path, supervised, "b.jsonl")]
    kinds = ["preferences", "supervised rows"]
    if first != kinds[0]:
        paths, kinds = paths[::-1], kinds[::-1]
    usable, other = reports(renderer, *paths)
    assert usable.findings == ()
    assert [(finding.level, finding.name) for finding in other.findings] == [("error", "another-kind")]
    assert other.findings[0].text.startswith(f"{paths[1]}: holds {kinds[1]}, but is checked as {kinds[0]}")
    assert other.listed == ()


def test_a_stray_row_of_another_kind_is_told_by_its_line(tmp_path: Path, renderer: Renderer | None) -> None:
    stray = {"prompt": "1 + 1 =", "completion": " 2"}
    paths = [
        write(tmp_path, distinct(2), "a.jsonl"),
        write(tmp_path, [stray, pair("q", "a", "b")], "b.jsonl"),
    ]
    report = reports(renderer, *paths)[1]
    assert [(row.line, row.outcome) for row in report.listed] == [(1, "refused")]
    assert "a supervised row" in report.listed[0].reason


def test_the_kind_is_that_of_the_first_file_that_has_a_row(tmp_path: Path) -> None:
    supervised = write(tmp_path, [{"prompt": "1 + 1 =", "completion": " 2"}], "b.jsonl")
    assert kind_of([str(tmp_path / "missing.jsonl"), supervised, write(tmp_path, distinct(1))]) is SFT
    assert kind_of([write(tmp_path, [{"what": "?"}], "c.jsonl"), supervised]) is PREFERENCES
