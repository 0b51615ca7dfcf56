"""ORPO: its loss against the paper's formula in numbers of fifty digits, and the recipe on a real model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import numbers, outcome, write_rows
from test_losses import pair

from firesteel.sdk import CheckpointError, ConfigError
from firesteel.store import home
from training.recipes import dpo_loop
from training.recipes.orpo_loop import Config, main
from training.utils.losses import PairLogprobs, make_pair_loss
from training.utils.odds_ratio import SUREST, OrpoObjective, log1mexp, odds_ratio_loss
from training.utils.pairs import PreferencePair

mpmath.mp.dps = 50
means = st.one_of(st.floats(-40, -1e-3), st.sampled_from([-1e-3, -1e-5, -2e-6, -700.0]))


def exact(x_c: float, x_r: float) -> mpmath.mpf:
    """-log σ(o(x_c) - o(x_r)), as the paper has it."""
    c, r = mpmath.mpf(x_c), mpmath.mpf(x_r)
    z = (c - mpmath.log(1 - mpmath.exp(c))) - (r - mpmath.log(1 - mpmath.exp(r)))
    return mpmath.log(1 + mpmath.exp(-z))


def computed(x_c: float, x_r: float) -> tuple[float, float, float]:
    """Value and both derivatives."""
    c, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (x_c, x_r))
    value = odds_ratio_loss(c, r)
    value.sum().backward()
    assert c.grad is not None
    assert r.grad is not None
    return value.item(), c.grad.item(), r.grad.item()


@settings(deadline=None, max_examples=200)
@given(means, means)
def test_value_and_derivatives_are_those_of_the_formula(x_c: float, x_r: float) -> None:
    value, by_chosen, by_rejected = computed(x_c, x_r)
    assert value == pytest.approx(float(exact(x_c, x_r)), rel=1e-12, abs=1e-14)
    h = mpmath.mpf(10) ** -25
    expected = (
        (exact(mpmath.mpf(x_c) + h, x_r) - exact(mpmath.mpf(x_c) - h, x_r)) / (2 * h),
        (exact(x_c, mpmath.mpf(x_r) + h) - exact(x_c, mpmath.mpf(x_r) - h)) / (2 * h),
    )
    assert by_chosen == pytest.approx(float(expected[0]), rel=1e-9, abs=1e-14)
    assert by_rejected == pytest.approx(float(expected[1]), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("x_c", [-1e-3, -1e-8, -1e-300, 0.0])
@pytest.mark.parametrize("x_r", [-1.0, -1e-3, -1e-8, 0.0])
def test_it_is_finite_where_a_model_is_certain(x_c: float, x_r: float) -> None:
    assert np.isfinite(computed(x_c, x_r)).all()
    if x_r == -1.0:
        p_r = np.exp(-1.0)
        assert computed(x_c, x_r)[1] == pytest.approx(-p_r / (1 - p_r), rel=2e-3)  # the limit, not 0


def test_a_rejected_answer_that_is_certain_is_still_pushed_down() -> None:
    assert computed(-1.0, 0.0) == computed(-1.0, 1e-9) == computed(-1.0, SUREST)
    assert np.isfinite(computed(1e-9, -1.0)).all()  # what rounding may say
    assert computed(-1.0, 0.0)[2] > 1e5


@pytest.mark.parametrize("x", [-1e-300, -1e-17, -1e-8, -0.5, -0.6931, -0.6932, -1.0, -40.0, -700.0])
def test_log1mexp_keeps_all_digits(x: float) -> None:
    value = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    mpmath.mp.dps = 400
    try:
        assert value == pytest.approx(float(mpmath.log(1 - mpmath.exp(mpmath.mpf(x)))), rel=1e-14)
    finally:
        mpmath.mp.dps = 50


def rows_of(pairs: list[PreferencePair], rng: np.random.Generator) -> list[torch.Tensor]:
    return [
        torch.tensor(-rng.exponential(1.0, d.model_input.length), requires_grad=True)
        for p in pairs
        for d in p.datums
    ]


@pytest.mark.parametrize("span", ["response", "all"])
def test_the_step_is_the_mean_over_pairs_of_likelihood_and_odds_ratio(span: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [pair(4, 2), pair(1, 5), pair(3, 3)]
    rows = rows_of(pairs, rng)
    nothing = [PairLogprobs(*(np.zeros(n) for n in sides)) for sides in ((4, 2), (1, 5), (3, 3))]
    loss, metrics = make_pair_loss(pairs, nothing, OrpoObjective(0.3, span))([], rows)  # type: ignore[arg-type]
    expected, nlls = [], []
    for index in range(3):
        chosen, rejected = (rows[2 * index + side].detach().numpy() for side in (0, 1))
        prompt = 2  # targets of the prompt, see test_losses.PROMPT
        nlls.append(-(chosen if span == "all" else chosen[prompt:]).mean())
        ratio = float(exact(chosen[prompt:].mean(), rejected[prompt:].mean()))
        expected.append(nlls[-1] + 0.3 * ratio)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert metrics["orpo_loss"] == pytest.approx(loss.item(), abs=1e-12)
    assert metrics["sft_loss"] == pytest.approx(np.mean(nlls), abs=1e-12)
    assert metrics["sft_loss"] + 0.3 * metrics["or_loss"] == pytest.approx(loss.item(), abs=1e-12)
    loss.backward()
    for index, row in enumerate(rows):
        assert row.grad is not None
        of_prompt = row.grad[:2]
        assert bool(of_prompt.any()) == (span == "all" and index % 2 == 0)


@pytest.mark.parametrize("span", ["response", "all"])
def test_a_pair_of_weight_2_counts_as_that_pair_twice(rng: np.random.Generator, span: str) -> None:
    """In the loss and in what it is said to be made of; what pairs are counted by is counted plainly."""
    one, two = pair(4, 2), pair(1, 5)
    values = {id(p): [torch.tensor(-rng.exponential(1.0, 2 + n)) for n in (c, r)] for p, c, r in (
        (one, 4, 2), (two, 1, 5))}  # fmt: skip
    objective = OrpoObjective(0.3, span)  # type: ignore[arg-type]

    def told(given: list[PreferencePair], like: list[PreferencePair]) -> tuple[float, dict[str, float]]:
        rows = [row for p in like for row in values[id(p)]]
        nothing = [PairLogprobs(*(np.zeros(len(row) - 2) for row in values[id(p)])) for p in like]
        loss, metrics = make_pair_loss(given, nothing, objective)([], rows)
        return loss.item(), dict(metrics)

    loss, metrics = told([replace(one, weight=2.0), two], [one, two])
    twice, of_twice = told([one, one, two], [one, one, two])
    assert loss == pytest.approx(twice, abs=1e-12)
    for name in ("orpo_loss", "sft_loss", "or_loss"):
        assert metrics[name] == pytest.approx(of_twice[name], abs=1e-12)
    assert metrics["orpo_loss"] == pytest.approx(metrics["sft_loss"] + 0.3 * metrics["or_loss"], abs=1e-12)
    _, plain = told([one, two], [one, two])
    assert metrics["log_odds_ratio"] == plain["log_odds_ratio"]
    assert abs(metrics["orpo_loss"] - plain["orpo_loss"]) > 1e-3


# The recipe


def config(folder: Path, count: int = 12, **given: Any) -> Config:
    values = {
        "log_path": str(folder / "run"),
        "base_model": "tiny-llama",
        "dataset": write_rows(folder / "pairs.jsonl", count),
        "lora_rank": 4,
        "learning_rate": 3e-3,
        "batch_size": 2,
        "epochs": 3,
        "report": False,
        **given,
    }
    return Config(**values)


@pytest.mark.parametrize("span", ["response", "all"])
def test_a_run_learns_the_chosen_answers_and_prefers_them(tmp_path: Path, span: str) -> None:
    cache = home() / "reference_cache.sqlite"
    before = cache.stat().st_mtime_ns if cache.exists() else None
    summary = main(config(tmp_path, eval_fraction=0.2, nll_span=span))
    assert summary.after["orpo_loss"] < summary.before["orpo_loss"] - 0.1
    assert summary.after["sft_loss"] < summary.before["sft_loss"]
    assert summary.after["log_odds_ratio"] > summary.before["log_odds_ratio"]
    assert summary.after["accuracy"] == 1
    assert summary.reference_job_id is None
    assert (cache.stat().st_mtime_ns if cache.exists() else None) == before
    names = {name.removeprefix("train/") for name in numbers(tmp_path / "run")[-2]}
    assert {line["train/ref_tokens"] for line in numbers(tmp_path / "run") if "train/ref_tokens" in line} == {
        0
    }
    cookbook = {
        "orpo_loss",
        "sft_loss",
        "or_loss",
        "log_odds_ratio",
        "accuracy",
        "step_tokens",
        "epoch",
        "lr",
    }
    assert cookbook <= {
        n for line in numbers(tmp_path / "run") for n in (k.removeprefix("train/") for k in line)
    }
    assert not [name for name in names if "delta_logp" in name]


def test_a_run_goes_on_to_the_bit_and_is_verified(tmp_path: Path) -> None:
    whole = config(tmp_path / "whole", epochs=2, dcp_save_interval=2, verify=True, nll_span="all")
    main(whole)
    cut = config(tmp_path / "cut", epochs=1, dcp_save_interval=2, nll_span="all")
    main(cut)
    again = cut.model_copy(update={"epochs": 2})
    main(again)
    assert outcome(again)["weights"] == outcome(whole)["weights"]  # type: ignore[arg-type]


def test_the_settings_that_a_run_writes_make_the_same_run(tmp_path: Path) -> None:
    given = config(tmp_path, keep_last=1, dcp_save_interval=6, eval_fraction=0.2, eval_interval=6)
    given = given.model_copy(update={"keep_best": "log_odds_ratio"})
    main(given)
    written = json.loads((tmp_path / "run/config.json").read_bytes())
    assert Config(**written).objective == given.objective
    assert "reference" not in written
    assert "beta" not in written


@pytest.mark.parametrize("saving", [0, 2])
def test_a_folder_of_another_recipe_is_another_run(tmp_path: Path, saving: int) -> None:
    """A finished run's summary is not that of the other, and its checkpoint is not gone on from."""
    shared = {"dcp_save_interval": saving, "epochs": 1}
    dpo_loop.main(runs.config(tmp_path, 12, loss="simpo", **shared))
    if saving:
        with pytest.raises(CheckpointError, match=r"recipe.*dpo.*orpo"):
            main(config(tmp_path, **{**shared, "epochs": 2}))
    else:
        main(config(tmp_path, **shared))
        assert any("train/orpo_loss" in line for line in numbers(tmp_path / "run"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 0.1}, "beta"),
        (
            {"trainer": {"reference_training_shape_id": "x"}},
            "reference_training_shape_id: this loss reads no",
        ),
        ({"reference": "base"}, "reference"),
        ({"orpo_lambda": -1}, "orpo_lambda"),
        ({"nll_span": "prompt"}, "nll_span"),
        (
            {"keep_best": "margin", "keep_last": 1, "dcp_save_interval": 2},
            "keep_best: 'margin'; there is accuracy, log_odds_ratio, orpo_loss",
        ),
    ],
)
def test_a_setting_that_orpo_does_not_have_is_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **given)
