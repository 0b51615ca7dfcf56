from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config, numbers

from training.recipes import orpo_loop
from training.recipes.dpo_loop import Config, main
from training.utils.displacement import (
    FEWEST_STEPS,
    LAST_STEPS,
    DisplacementWatch,
    since_start,
    standard_error,
)
from training.utils.heldout_rows import HeldoutRow, HeldoutRows, read_heldout

START = {
    "margin": 0.0,
    "delta_logp/chosen": 0.0,
    "delta_logp/rejected": 0.0,
    "delta_logp/chosen_stderr": 0.0,
}


def heldout(margin: float, chosen: float, stderr: float = 0.1) -> dict[str, float]:
    values = (margin, chosen, chosen - margin, stderr)
    return dict(zip(START, values, strict=True))


def step(margin: float, chosen: float) -> dict[str, float]:
    return {"train/margin": margin, "delta_logp/chosen": chosen, "delta_logp/rejected": chosen - margin}


def is_warned(now: dict[str, float], before: dict[str, float] = START) -> bool:
    return bool(DisplacementWatch().verdict(before, now))


# On held-out pairs


@pytest.mark.parametrize(
    ("now", "warned"),
    [
        (heldout(5.0, -3.0), True),
        (heldout(5.0, +3.0), False),  # learns both
        (heldout(-1.0, -3.0), False),  # learns nothing: another trouble
        (heldout(5.0, -3.0, stderr=1.6), False),  # 1.96 standard errors reach 0
        (heldout(5.0, -3.0, stderr=1.5), True),
        (heldout(0.0005, -3.0), False),  # within what is a tie
        (heldout(5.0, -0.002, stderr=0.001), False),  # within rounding
        (heldout(5.0, -3.0, stderr=math.nan), False),  # one pair alone
    ],
)
def test_a_margin_that_grows_while_chosen_answers_become_less_likely_is_displacement(
    now: dict[str, float], warned: bool
) -> None:
    assert is_warned(now) is warned


def test_what_the_start_was_like_is_no_displacement() -> None:
    """A policy that was trained before, held to the base model."""
    start = heldout(5.0, -3.0)
    assert not is_warned(heldout(6.0, -2.5), start)
    assert is_warned(heldout(6.0, -3.5), start)


# Of a loss without a reference, since the start


def pairs(*logps: tuple[float, float]) -> HeldoutRows:
    rows = [
        HeldoutRow(line, 0.0, {"chosen": 2, "rejected": 2}, 1, {"chosen": c, "rejected": r})
        for line, (c, r) in enumerate(logps, start=1)
    ]
    return HeldoutRows("margin", rows)


def test_what_changed_since_the_start_is_counted_pair_by_pair() -> None:
    found = since_start(pairs((-10, -20), (-30, -40)), pairs((-11, -25), (-33, -41)))
    assert found == {
        "since_start/chosen": -2.0,  # of -1 and -3
        "since_start/rejected": -3.0,
        "since_start/chosen_stderr": pytest.approx(1.0),  # √2 / √2
    }


def test_a_start_that_is_not_known_for_every_pair_says_nothing() -> None:
    now = pairs((-1, -1), (-2, -2))
    assert since_start(None, now) == {}
    assert since_start(pairs((-1, -1)), now) == {}
    bare = HeldoutRows("margin", [HeldoutRow(line, 0.0, {"chosen": 1, "rejected": 1}) for line in (1, 2)])
    assert since_start(bare, now) == since_start(now, bare) == {}


def test_the_pairs_of_one_list_are_one_observation() -> None:
    def list_of(*logps: float) -> HeldoutRows:
        rows = [
            HeldoutRow(1, 0.0, {"chosen": 1, "rejected": 1}, place, {"chosen": logp, "rejected": logp})
            for place, logp in enumerate(logps, start=1)
        ]
        return HeldoutRows("margin", rows)

    found = since_start(list_of(0, 0, 0), list_of(-1, -2, -3))
    assert found["since_start/chosen"] == -2
    assert math.isnan(found["since_start/chosen_stderr"])  # of one observation nothing is known


@pytest.mark.parametrize("name", ["margin", "log_odds_ratio"])
def test_a_loss_without_a_reference_is_held_to_its_own_start(name: str) -> None:
    def heldout(margin: float, chosen: float) -> dict[str, float]:
        changes = {"since_start/chosen": chosen, "since_start/rejected": chosen - 5}
        return {name: margin, **changes, "since_start/chosen_stderr": 0.1}

    start = {name: 0.5}
    (said,) = DisplacementWatch().verdict(start, heldout(2.0, -3.0))
    assert f"the {name.replace('_', ' ')} has grown from +0.500 to +2.000" in said
    assert "change of logp since the start, chosen -3.00 ± 0.20, rejected -8.00" in said
    assert ("orpo_lambda" in said) == (name == "log_odds_ratio")
    assert not is_warned(heldout(2.0, -0.1), start)  # within noise
    assert not is_warned(heldout(0.4, -3.0), start)
    assert not is_warned({name: 5.0}, start)


def test_it_is_said_once_and_says_what_to_try() -> None:
    watch = DisplacementWatch()
    assert list(watch.warnings(START, heldout(1.0, 0.5))) == []
    (said,) = watch.warnings(START, heldout(5.0, -3.0, 0.5))
    assert "from +0.000 to +5.000" in said
    assert "Δlogp chosen -3.00 ± 0.98, rejected -8.00" in said
    assert all(name in said for name in ("sft_weight", "beta", "learning_rate", "docs/losses.md"))
    assert list(watch.warnings(START, heldout(6.0, -4.0))) == []
    assert watch.verdict(START, heldout(5.0, -3.0, 0.5)) == [said]
    assert watch.verdict(START, heldout(6.0, 1.0)) == []  # it has gone again


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_standard_error_is_that_of_a_mean(values: list[float]) -> None:
    n, mean = len(values), sum(values) / len(values)
    expected = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    assert standard_error(np.array(values)) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.integers(1, 4))
def test_a_value_that_is_told_several_times_is_no_surer(values: list[float], times: int) -> None:
    often, rows = np.repeat(values, times), np.repeat(np.arange(len(values)), times)
    once = standard_error(np.array(values))
    assert standard_error(often, rows.tolist()) == pytest.approx(once, abs=1e-9)


# On training steps, where nothing is held out


def test_without_heldout_pairs_the_last_steps_are_looked_at() -> None:
    start, fallen = step(0.0, 0.0), [step(9.0, -1.0 - number % 2) for number in range(LAST_STEPS)]
    (said,) = DisplacementWatch([start, *(step(9.0, 30.0) for _ in range(5)), *fallen]).verdict({}, None)
    assert "from +0.000 to +9.000" in said
    assert "Δlogp chosen -1.50" in said
    assert DisplacementWatch([start, *fallen[: FEWEST_STEPS - 2]]).verdict({}, None) == []  # too few
    assert DisplacementWatch([start, *fallen[: FEWEST_STEPS - 1]]).verdict({}, None) != []


def test_skipped_steps_say_nothing() -> None:
    made = [step(0.0, 0.0), *(step(9.0, -1.0) for _ in range(LAST_STEPS))]
    skipped = {"train/epoch": 1.0, "train/skipped_steps": 1.0}
    cut = {"train/margin": None, "delta_logp/chosen": None, "delta_logp/rejected": None}
    watch = DisplacementWatch(made)
    watch.step(skipped)
    watch.step(cut)  # type: ignore[arg-type]  # as metrics.jsonl has what was not finite
    assert watch.verdict({}, None) == DisplacementWatch(made).verdict({}, None) != []


# In runs


def displacing(folder: Path, **values: Any) -> Config:
    """Answers that differ in their last letter: what parts them goes through all that they share."""
    settings = config(folder, **{"learning_rate": 0.015, "beta": 0.02, "seed": 1, "epochs": 2, **values})
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "chosen": [{"role": "assistant", "content": f"{number * 7919 % 10007} is the sum x"}],
            "rejected": [{"role": "assistant", "content": f"{number * 7919 % 10007} is the sum y"}],
        }
        for number in range(24)
    ]
    Path(settings.dataset).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings


@pytest.mark.parametrize("heldout", [0.4, 0.0], ids=["held out", "nothing held out"])
def test_a_run_that_displaces_says_so_and_notes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], heldout: float
) -> None:
    summary = main(displacing(tmp_path, eval_fraction=heldout))
    (warning,) = summary.warnings
    said = [line for line in capsys.readouterr().out.splitlines() if "likelihood displacement" in line]
    assert [line.split(":")[1].split(" ")[1] for line in said] == ["step", "at"]
    assert said[-1] == f"warning: at the end of the run: {warning}"
    assert json.loads((tmp_path / "run/summary.json").read_text())["warnings"] == [warning]


def test_a_run_that_learns_its_answers_is_not_warned(tmp_path: Path) -> None:
    assert main(config(tmp_path, count=12, epochs=4)).warnings == []


def test_a_run_that_goes_on_judges_by_all_its_steps(tmp_path: Path) -> None:
    whole = main(displacing(tmp_path / "whole", dcp_save_interval=4))
    main(displacing(tmp_path / "parts", dcp_save_interval=4, epochs=1))
    parts = main(displacing(tmp_path / "parts", dcp_save_interval=4))
    assert numbers(tmp_path / "parts/run") == numbers(tmp_path / "whole/run")
    assert parts.warnings == whole.warnings != []


def changes_since_the_start(folder: Path, steps: int, side: str) -> list[float]:
    before, after = (read_heldout(folder / "run", step) for step in (0, steps))
    assert before
    assert after
    return [now.logps[side] - then.logps[side] for now, then in zip(after.rows, before.rows, strict=True)]


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_run_without_a_reference_compares_each_heldout_pair_with_its_start(
    tmp_path: Path, loss: str
) -> None:
    """Here SimPO displaces; ORPO learns its chosen answers."""
    common = {"eval_fraction": 0.4, "eval_interval": 3}
    if loss == "simpo":
        summary = main(displacing(tmp_path, **common, loss="simpo", beta=2.0, simpo_gamma=1.0))
    else:
        values = displacing(tmp_path, **common).model_dump(exclude_unset=True, exclude={"beta"})
        summary = orpo_loop.main(orpo_loop.Config(**values))
    said = ["change of logp since the start" in warning for warning in summary.warnings]
    assert said == ([True] if loss == "simpo" else [])
    for side in ("chosen", "rejected"):
        changes = changes_since_the_start(tmp_path, summary.steps, side)
        told = summary.after[f"since_start/{side}"]
        assert told == pytest.approx(sum(changes) / len(changes), abs=1e-5)
        assert told == pytest.approx(
            summary.after[f"logps/{side}"] - summary.before[f"logps/{side}"], abs=1e-4
        )
