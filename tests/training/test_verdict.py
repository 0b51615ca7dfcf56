from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import leaked, lists, losses, made_run, margins

from training.utils.environment import Environment
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, write_heldout
from training.utils.run_record import RunRecord, read_run
from training.utils.verdict import main_loss, verdict_of


def run_with(
    folder: Path, after: dict[str, Any], rows: int = 100, before: dict[str, Any] | None = None
) -> RunRecord:
    """A run whose held-out metrics went from and to these."""
    import json

    config = {"log_path": "x", "base_model": "y", "dataset": "z"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"train/step": step, **{f"eval/{n}": v for n, v in metrics.items()}}
        for step, metrics in ((0, before or {"accuracy": 0.0, "tie_rate": 1.0}), (9, after))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 9):
        held = [HeldoutRow(line, 1.0, {"chosen": 1}) for line in range(1, rows + 1)]
        write_heldout(folder, step, HeldoutRows("margin", held))
    return read_run(folder)


@pytest.mark.parametrize(
    ("accuracy", "rows", "kind"),
    [
        (0.9, 100, "yes"),
        (0.56, 100, "unclear"),
        (0.56, 2000, "yes"),
        (0.5, 5000, "unclear"),
        (0.3, 100, "no"),
    ],
)
def test_an_answer_is_given_where_the_interval_lies_on_one_side_of_a_coin(
    tmp_path: Path, accuracy: float, rows: int, kind: str
) -> None:
    assert verdict_of(run_with(tmp_path, {"accuracy": accuracy, "tie_rate": 0.0}, rows)).kind == kind


@pytest.mark.parametrize(
    ("before", "after", "kind"), [(0.9, 0.65, "no"), (0.9, 0.9, "unclear"), (0.6, 0.9, "yes")]
)
def test_who_preferred_the_chosen_answers_before_must_do_so_more(
    tmp_path: Path, before: float, after: float, kind: str
) -> None:
    """ORPO, simpo and `reference: base` do not start at ties: 0.65 after 0.9 is no learning."""
    start, end = ({"accuracy": value, "tie_rate": 0.0} for value in (before, after))
    run = run_with(tmp_path, end, 200, before=start)
    held = run.heldout
    assert held is not None
    moved = [replace(row, value=row.value + (after - before) * (1 + row.line % 2)) for row in held.after.rows]
    changed = replace(run, heldout=replace(held, after=replace(held.after, rows=moved)))
    assert verdict_of(changed).kind == kind


def test_ties_are_not_taken_for_preferring_the_rejected_answers(tmp_path: Path) -> None:
    verdict = verdict_of(run_with(tmp_path, {"accuracy": 0.35, "tie_rate": 0.45}))
    assert (verdict.kind, "still ties" in verdict.answer) == ("unclear", True)


def test_a_loss_that_rose_by_less_than_is_shown_is_not_past_its_best(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"loss": 0.6931472}, before={"loss": 0.6931472})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 10, "eval/loss": 0.6931471}\n{"train/step": 11, "eval/loss": 0.6931472}\n')
    assert not [w for w in verdict_of(read_run(tmp_path)).warnings if "lowest" in w]
    assert run.after


def test_an_interval_that_was_logged_is_taken(tmp_path: Path) -> None:
    logged = {"accuracy": 0.9, "accuracy_low": 0.4, "accuracy_high": 0.95}
    verdict = verdict_of(run_with(tmp_path, logged))
    assert verdict.kind == "unclear"
    assert "95 % interval 0.400 to 0.950" in verdict.facts[0]


def test_margins_that_stay_ties_are_no_learning(tmp_path: Path) -> None:
    verdict = verdict_of(run_with(tmp_path, {"accuracy": 0.1, "tie_rate": 0.9}))
    assert (verdict.kind, "hardly moved" in verdict.answer) == ("no", True)


@pytest.mark.parametrize(("change", "flagged"), [(-3.0, True), (-0.1, False), (2.0, False)])
def test_chosen_answers_that_became_less_likely_are_pointed_out(
    tmp_path: Path, change: float, flagged: bool
) -> None:
    told = {"accuracy": 0.9, "delta_logp/rejected": -9.0, "delta_logp/chosen_stderr": 0.2}
    after = {**told, "margin": 9 + change, "delta_logp/chosen": change}
    start = {
        "margin": 0.0,
        "delta_logp/chosen": 0.0,
        "delta_logp/rejected": 0.0,
        "delta_logp/chosen_stderr": 0.0,
    }
    warnings = " ".join(verdict_of(run_with(tmp_path, after, before=start)).warnings)
    assert ("Likelihood displacement" in warnings) == flagged


@pytest.mark.parametrize(("before", "after", "kind"), [(2.0, 1.5, "yes"), (2.0, 2.5, "no")])
def test_without_an_accuracy_the_loss_answers(tmp_path: Path, before: float, after: float, kind: str) -> None:
    assert verdict_of(run_with(tmp_path, {"loss": after}, before={"loss": before})).kind == kind


def test_a_held_out_loss_that_was_lower_before_the_end_is_pointed_out(tmp_path: Path) -> None:
    import json

    run_with(tmp_path, {"loss": 2.0})
    losses = [2.0, 1.0, 1.6]
    lines = [json.dumps({"train/step": step, "eval/loss": loss}) for step, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    told = " ".join(verdict_of(read_run(tmp_path)).warnings)
    assert "lowest after step 1 (1.0000) and has risen to 1.6000" in told


def test_the_loss_of_a_run_is_that_which_it_minimises() -> None:
    assert main_loss({"train/or_loss": 0, "train/sft_loss": 0, "train/orpo_loss": 0}) == "orpo_loss"
    assert main_loss({"eval/loss": 0, "eval/perplexity": 0}) == "loss"
    assert main_loss({"train/strange_loss": 0, "train/lr": 0}) == "strange_loss"
    assert main_loss({"train/lr": 0}) is None


@pytest.mark.parametrize(
    ("changes", "kind"),
    [([-0.3, -0.2, -0.4, -0.3], "yes"), ([-3.0, 2.9, -2.8, 2.7], "unclear")],
    ids=["all", "some"],
)
def test_a_loss_that_fell_on_some_rows_and_rose_on_others_shows_nothing(
    tmp_path: Path, changes: list[float], kind: str
) -> None:
    run_with(tmp_path, {"sft_loss": 1.95}, before={"sft_loss": 2.0})
    for step in (0, 9):
        values = [2.0 + (change if step else 0) for change in changes]
        rows = [HeldoutRow(line, value, {"learned": 5}) for line, value in enumerate(values, start=1)]
        write_heldout(tmp_path, step, HeldoutRows("sft_loss", rows))
    assert verdict_of(read_run(tmp_path)).kind == kind


GREW = ({"accuracy": 0.5, "tie_rate": 0.0}, {"accuracy": 0.95, "tie_rate": 0.0})
TIED = ({"accuracy": 0.0, "tie_rate": 1.0}, {"accuracy": 0.95, "tie_rate": 0.0})
FELL = ({"sft_loss": 2.0}, {"sft_loss": 1.75})


def test_the_pairs_of_a_list_are_one_row_of_a_change(tmp_path: Path) -> None:
    """Ten pairs each that have changed together: as 40 they would say that the margins have grown."""
    changes = (1.0, -0.2, 1.0, -0.2)
    before, after = lists([[5.0] * 10] * 4), lists([[5.0 + change] * 10 for change in changes])
    metrics = [{**told, "accuracy_low": 0.6, "accuracy_high": 1.0} for told in GREW]
    assert verdict_of(made_run(tmp_path / "a", metrics, (before, after))).kind == "unclear"
    forty = [margins([5.0] * 40), margins([5.0 + change for change in changes for _ in range(10)])]
    assert verdict_of(made_run(tmp_path / "b", metrics, forty)).kind == "yes"


def test_a_pair_is_compared_with_itself_before(tmp_path: Path) -> None:
    """The second pair of each list starts 5 below the first, and both have grown."""
    grown = [0.3, 0.2, 0.4, 0.3, 0.2, 0.3]
    before, after = lists([[5.0, 0.0]] * 6), lists([[5.0 + g, g] for g in grown])
    metrics = [{**told, "accuracy_low": 0.6, "accuracy_high": 1.0} for told in GREW]
    assert verdict_of(made_run(tmp_path, metrics, (before, after))).kind == "yes"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [([-0.3, -0.2], "unclear"), ([-0.3, -0.2, -0.25], "yes")],
    ids=["two rows", "three"],
)
def test_two_rows_that_agree_may_do_so_by_chance(tmp_path: Path, changes: list[float], kind: str) -> None:
    """By Student's t: 12.7 standard errors of two, not 1.96."""
    rows = losses([2.0] * len(changes)), losses([2.0 + change for change in changes])
    assert verdict_of(made_run(tmp_path, FELL, rows)).kind == kind


def test_a_mean_that_fell_while_its_rows_rose_shows_nothing(tmp_path: Path) -> None:
    """Rows of many tokens weigh more in the loss."""
    rows = losses([2.0] * 4), losses([2.3, 2.2, 2.25, 2.3])
    assert verdict_of(made_run(tmp_path, FELL, rows)).kind == "unclear"


def test_a_list_counts_as_one_row_whatever_its_pairs(tmp_path: Path) -> None:
    rows = lists([[1.0] * 7 + [-1.0] * 3] * 10)
    metrics = TIED[0], {"accuracy": 0.7, "tie_rate": 0.0}
    verdict = verdict_of(made_run(tmp_path, metrics, (rows, rows)))
    assert verdict.kind == "unclear"  # of 10; of 100 it would be yes
    assert verdict.facts[0].startswith("Accuracy of the 100 pairs of 10 held-out rows: 0.000 → 0.700 (95 %")
    assert "Only 10 rows are held out: most differences between runs are chance." in verdict.warnings


NOT_SHOWN = "Not shown: it prefers the chosen answers of the held-out rows, but "
UNSEEN = "rows that it was not trained on"


@pytest.mark.parametrize(
    ("right", "count", "kind", "said"),
    [
        (95, 0, "yes", f"Yes: it prefers the chosen answers of {UNSEEN}."),
        (
            95,
            3,
            "yes",
            "Yes: it prefers the chosen answers of the held-out rows; that would be so without the 3 of 100 that are "
            "among the training rows, too, whichever they are.",
        ),
        (
            65,
            30,
            "unclear",
            f"{NOT_SHOWN}30 of them are among the training rows.",
        ),
        (
            95,
            100,
            "unclear",
            f"{NOT_SHOWN}all of them are among the training rows.",
        ),
        (
            60,
            1,
            "unclear",
            f"{NOT_SHOWN}1 of them is among the training rows.",
        ),
    ],
)
def test_held_out_rows_that_are_trained_on_prove_nothing_of_others(
    tmp_path: Path, right: int, count: int, kind: str, said: str
) -> None:
    """Left out, as if they were those that are right, the others must say the same: 59 of 99 do not, by a hair."""
    metrics = TIED[0], {"accuracy": right / 100, "tie_rate": 0.0}
    rows = margins([0.0] * 100), margins([1.0] * right + [-1.0] * (100 - right))
    verdict = verdict_of(made_run(tmp_path, metrics, rows, leaked(count) if count else []))
    assert (verdict.kind, verdict.answer) == (kind, said)
    told = f"eval_dataset: {count} held-out rows are among the training rows."
    assert (told in verdict.warnings) == (count > 0)


@pytest.mark.parametrize(("count", "kind"), [(0, "yes"), (1, "yes"), (10, "unclear"), (16, "unclear")])
def test_a_loss_must_have_come_down_without_the_rows_that_are_trained_on(
    tmp_path: Path, count: int, kind: str
) -> None:
    rows = losses([2.0] * 16), losses([1.0] * 10 + [2.1, 1.9] * 3)
    verdict = verdict_of(made_run(tmp_path, FELL, rows, leaked(count) if count else []))
    assert verdict.kind == kind
    assert (UNSEEN in verdict.answer) == (count == 0)


@pytest.mark.parametrize(("others", "kind"), [(0.0, "unclear"), (1.0, "yes")])
def test_margins_must_have_grown_without_the_rows_that_are_trained_on(
    tmp_path: Path, others: float, kind: str
) -> None:
    """Of a policy that preferred the chosen answers before, and all of them now: ten much more, or the others too."""
    grown = [9.0] * 10 + [others + change for change in (0.0, 0.1, -0.1) * 10]
    rows = margins([1.0] * 40), margins([1.0 + change for change in grown])
    metrics = {"accuracy": 0.9, "tie_rate": 0.0}, {"accuracy": 1.0, "tie_rate": 0.0}
    assert verdict_of(made_run(tmp_path / "a", metrics, rows, leaked(10))).kind == kind
    assert verdict_of(made_run(tmp_path / "b", metrics, rows)).kind == "yes"


@pytest.mark.parametrize(
    ("content", "kind", "told"),
    [
        (("a", "b"), "yes", "whether they are among the training rows is not recorded"),
        (("a", "a"), "unclear", "but all of them are among the training rows"),
    ],
    ids=["two files", "one file"],
)
def test_of_an_older_run_it_is_not_claimed_that_its_held_out_rows_are_not_trained_on(
    tmp_path: Path, content: tuple[str, str], kind: str, told: str
) -> None:
    rows = margins([0.0] * 40), margins([1.0] * 40)
    metrics = {"accuracy": 0.0, "tie_rate": 1.0}, {"accuracy": 1.0, "tie_rate": 0.0}
    folder = tmp_path / "run"
    made_run(folder, metrics, rows, eval_dataset="other.jsonl")
    data = dict(zip(("dataset content", "eval_dataset content"), content, strict=True))
    Environment("dpo", 9, "", "", {}, {}, {}, data, None).write(folder / "environment.json")
    verdict = verdict_of(read_run(folder))
    assert verdict.kind == kind
    assert told in verdict.answer
    assert UNSEEN not in verdict.answer


def test_of_one_file_whole_prompts_are_held_out(tmp_path: Path) -> None:
    rows = margins([0.0] * 40), margins([1.0] * 40)
    metrics = {"accuracy": 0.0, "tie_rate": 1.0}, {"accuracy": 1.0, "tie_rate": 0.0}
    assert UNSEEN in verdict_of(made_run(tmp_path, metrics, rows, eval_fraction=0.2)).answer


NOT_ONE = "No: not one held-out row has finite log-probabilities."


@pytest.mark.parametrize(
    "after",
    [
        {"nonfinite_rows": 3},
        {"sft_loss": None, "perplexity": None},
        {"dpo_loss": None, "margin": None, "delta_logp/chosen": None, "logps/chosen": None},
    ],
    ids=["left out", "an older run of SFT", "an older run of DPO"],
)
@pytest.mark.parametrize("before", [{}, {"sft_loss": 2.0}, {"dpo_loss": None, "margin": None}])
def test_rows_without_a_finite_number_answer_no(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    verdict = verdict_of(made_run(tmp_path, (before, after)))
    assert (verdict.kind, verdict.answer) == ("no", NOT_ONE)


def test_an_older_run_all_of_whose_rows_are_lost_does_not_prefer_the_rejected_answers(tmp_path: Path) -> None:
    """A value that is no number is above no tie: its accuracy was 0."""
    lost = {"accuracy": 0.0, "tie_rate": 0.0, "accuracy_low": 0.0, "accuracy_high": 0.3, "margin": None}
    verdict = verdict_of(made_run(tmp_path, (TIED[0], lost), (margins([0.0] * 9), margins([math.nan] * 9))))
    assert verdict.answer == NOT_ONE


def test_an_older_run_of_sft_one_of_whose_rows_is_lost_has_no_mean(tmp_path: Path) -> None:
    rows = losses([2.0] * 4), losses([1.0, 1.1, 1.2, math.nan])
    verdict = verdict_of(
        made_run(tmp_path, ({"sft_loss": 2.0}, {"sft_loss": None, "perplexity": None}), rows)
    )
    assert (verdict.kind, "have spoiled every held-out mean" in verdict.answer) == ("unknown", True)
    told = "1 held-out row has log-probabilities that are not finite: no mean over all rows is finite."
    assert told in verdict.warnings


@pytest.mark.parametrize("name", ["accuracy", "margin", "delta_logp/rejected", "dpo_loss", "tie_rate"])
@pytest.mark.parametrize("value", [None, "missing"])
def test_a_metric_that_is_null_or_missing_is_not_told(tmp_path: Path, name: str, value: object) -> None:
    told: dict[str, float | None] = {
        "accuracy": 0.9,
        "margin": 2.0,
        "delta_logp/chosen": 1.0,
        "delta_logp/rejected": -1.0,
        "dpo_loss": 0.5,
        "tie_rate": 0.0,
    }
    spoiled = {**told, name: None}
    if value == "missing":
        del spoiled[name]
    for place, metrics in enumerate(((told, spoiled), (spoiled, told), (spoiled, spoiled))):
        verdict = verdict_of(made_run(tmp_path / str(place), metrics))
        assert "nan" not in " ".join(verdict.facts)
        assert len(verdict.facts) >= 3


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (1, "1 held-out row is left out: its log-probabilities are not finite."),
        (2, "2 held-out rows are left out: their log-probabilities are not finite."),
    ],
)
def test_rows_that_are_not_finite_are_counted_and_not_among_those_of_the_accuracy(
    tmp_path: Path, lost: int, told: str
) -> None:
    rows = margins([0.0] * 40), margins([1.0] * (40 - lost) + [math.nan] * lost)
    metrics = TIED[0], {"accuracy": 0.9, "tie_rate": 0.0, "nonfinite_rows": lost}
    verdict = verdict_of(made_run(tmp_path, metrics, rows))
    assert told in verdict.warnings
    assert verdict.facts[0].startswith(f"Accuracy of {40 - lost} held-out rows")
    older = made_run(tmp_path / "older", (TIED[0], {"accuracy": 0.9, "tie_rate": 0.0}), rows)
    verdict = verdict_of(older)
    assert [w for w in verdict.warnings if w.endswith("as wrong.")]
    assert verdict.facts[0].startswith("Accuracy of 40 held-out rows")


def test_one_thing_is_told_as_one(tmp_path: Path) -> None:
    made_run(tmp_path, TIED, (margins([0.0]), margins([1.0])))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 9, "train/skipped_steps": 1}\nnone\n')
    (tmp_path / "bad_rows.jsonl").write_text(
        '{"file": "x", "line": 1, "outcome": "refused", "reason": "y"}\n{}\n'
    )
    assert verdict_of(read_run(tmp_path)).warnings == [
        "1 step was skipped: its loss or gradient was not finite.",
        "Only 1 row is held out: most differences between runs are chance.",
        "1 row of the data was refused, dropped or shortened; see Rows lost.",
        "1 line of metrics.jsonl is damaged and left out.",
        "1 line of bad_rows.jsonl is damaged and left out.",
    ]


def test_the_loss_of_one_source_is_not_that_of_the_run() -> None:
    assert main_loss({"eval/source/web/sft_loss": 0, "eval/other_loss": 0}) == "other_loss"
    assert main_loss({"source/web/sft_loss": 0, "source/web/loss": 0}) is None


def test_a_metric_that_the_newest_evaluation_lacks_is_not_taken_from_an_earlier_one(tmp_path: Path) -> None:
    made_run(tmp_path, (TIED[0], {"accuracy": 1.0, "tie_rate": 0.0, "nonfinite_rows": 2}))
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"train/step": 12, "eval/nonfinite_rows": 9}\n')
    assert verdict_of(read_run(tmp_path)).answer == NOT_ONE
    healed = '{"train/step": 15, "eval/accuracy": 1.0, "eval/tie_rate": 0.0}\n'
    (tmp_path / "metrics.jsonl").write_text(lines + healed)
    assert read_run(tmp_path).after == {"accuracy": 1.0, "tie_rate": 0.0}
