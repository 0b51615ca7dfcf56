from __future__ import annotations

import pytest

from training.utils.metrics import Savings, StepWork, heldout_line


def test_tokens_saved_are_the_share_that_the_trainer_did_not_compute() -> None:
    computed = {"tokens:sum": 40.0, "computed_tokens:sum": 30.0, "scored_tokens:sum": 8.0}
    work = StepWork(44, 2.0, False, {**computed, "micro_batches:sum": 1.0, "activation_bytes:max": 0.0})
    assert work.metrics["tokens_saved"] == 0.25


def test_savings_of_a_run_weigh_steps_by_their_tokens_and_skip_those_without() -> None:
    savings = Savings()
    assert savings.tokens == 0
    for given, computed in ((100, 50), (300, 300)):
        savings.add({"train/computed_tokens": computed, "train/tokens_saved": 1 - computed / given})
    savings.add({"train/skipped_steps": 1})
    assert savings.tokens == pytest.approx(50 / 400)


def test_savings_are_told_with_the_reference_where_there_is_one() -> None:
    savings = Savings()
    savings.add({"train/computed_tokens": 60.0, "train/tokens_saved": 0.4})
    assert savings.line({}) == "saved: 40.0% of the tokens, by shared prefixes"
    told = savings.line({"reference/cache_hits": 1200, "reference/computed": 3})
    assert told.endswith("; reference values of 1,200 pairs from the cache, of 3 computed")


def test_people_are_told_how_sure_a_heldout_accuracy_is() -> None:
    metrics = {"margin": 1.0, "accuracy": 0.62, "accuracy_low": 0.522, "accuracy_high": 0.709}
    line = heldout_line(20, metrics | {"policy_preference": 0.5}, ("margin", "accuracy"))
    assert "margin +1.000  accuracy 0.620 (95 %: 0.522–0.709)  own preference" in line
