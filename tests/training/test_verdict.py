from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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
