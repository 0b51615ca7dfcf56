from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firesteel.sdk import AdamParams, DataError, TrainingClient
from training.utils import DpoObjective, ReconnectableClient, build_service_client
from training.utils.accuracy import Traits
from training.utils.evaluation import Answers, drawn_by_prompt, evaluate, heldout_metrics
from training.utils.losses import PairScores, SideScores, Stages
from training.utils.preference_rows import PREFERENCES
from training.utils.reference_pass import References
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import select_rows


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.floats(0, 0.9), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_of_a_split(prompts: list[int], fraction: float, seed: int) -> None:
    given_prompts = np.array(prompts)
    if fraction and len(set(prompts)) < 2:
        with pytest.raises(DataError, match="eval_fraction: all rows have one prompt"):
            drawn_by_prompt(given_prompts, fraction, seed)
        return
    held = drawn_by_prompt(given_prompts, fraction, seed)
    assert not held.all()
    assert set(given_prompts[held]).isdisjoint(given_prompts[~held])
    assert held.sum() >= fraction * len(prompts) or len(set(given_prompts[~held])) == 1
    if fraction == 0:
        assert not held.any()


def test_the_seed_draws_the_split() -> None:
    drawn = [drawn_by_prompt(np.arange(40), 0.25, seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(drawn[0]) == 10


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(0, 5))
def test_the_split_depends_on_which_prompts_are_equal_and_not_on_their_values(
    prompts: list[int], seed: int
) -> None:
    if len(set(prompts)) < 2:
        return
    renamed = [hash((prompt, "other")) % 2**60 for prompt in prompts]
    one, other = (drawn_by_prompt(np.array(keys), 0.4, seed) for keys in (prompts, renamed))
    assert (one == other).all()


@pytest.fixture
def policy() -> Iterator[TrainingClient]:
    with build_service_client(base_model="tiny-llama", lora_rank=0) as service:
        yield service.create_training_client()


def test_metrics_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Q{i}",
            "chosen": "yes" * (1 + i % 2),
            "rejected": "no" * (1 + i % 4),
            "source": f"s{i % 3}",
        }
        for i in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer.load("tiny-llama")
    index, rules = index_rows(str(path), renderer, PREFERENCES), Rendering(8, "response_end")
    with (
        build_service_client(base_model="tiny-llama", lora_rank=4) as service,
        closing(select_rows(index, renderer, rules)) as selected,
    ):
        policy = service.create_training_client()
        with closing(References(service, renderer, "lazy")) as references:
            pairs = selected.rows
            data = [datum for pair in pairs.take(range(3)) for datum in pair.datums]
            policy.forward_backward(data)  # any step away from the reference
            policy.optim_step(AdamParams(learning_rate=1e-2))
            client = ReconnectableClient.from_training_client(policy)
            one, *others = [evaluate(client, pairs, references, DpoObjective(0.1), n) for n in (1, 3, 7)]
    assert one["accuracy"] not in (0, 1)
    for other in others:
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
    # A letter is a token, so is the end; the prompt has two: responses over 6 tokens are those of rows 1, 2, 3, 5, 6.
    assert (one["truncated"], one["chosen_longer"]) == (pytest.approx(5 / 7), pytest.approx(4 / 7))
    assert sum(one[f"source/s{i}/count"] * one[f"source/s{i}/margin"] for i in range(3)) == pytest.approx(
        7 * one["margin"]
    )
    right = sum(one[f"source/s{i}/count"] * one[f"source/s{i}/accuracy"] for i in range(3))
    assert right == pytest.approx(7 * one["accuracy"])
    assert one["accuracy_low"] < one["accuracy"] < one["accuracy_high"]


def scored_pairs(deltas: list[float]) -> PairScores:
    """Pairs whose chosen sides are by so much likelier than under the reference."""
    values = torch.tensor(deltas, dtype=torch.float64)
    zeros = torch.zeros_like(values)
    chosen = SideScores(values, *[zeros] * 3, zeros + 2, zeros, zeros)
    rejected = SideScores(*[zeros] * 4, zeros + 4, zeros, zeros)
    stages = Stages(torch.arange(len(deltas)), zeros + 1)
    return PairScores(chosen, rejected, zeros + 1, stages)


def test_the_pairs_of_a_ranked_list_are_one_observation_for_the_standard_error() -> None:
    deltas = [1.0, 2.0, 4.0, 3.0, 0.0, 2.0]

    def stderr(lines: list[int]) -> float:
        traits = [Traits(1, row_pairs=lines.count(line), line=line) for line in lines]
        return heldout_metrics(scored_pairs(deltas), traits, DpoObjective(0.1))["delta_logp/chosen_stderr"]

    assert stderr([1, 2, 3, 4, 5, 6]) == pytest.approx(np.std(deltas, ddof=1) / math.sqrt(6))
    lists = [7 / 3, 5 / 3]  # the means of two lists of the same length
    assert stderr([1, 1, 1, 2, 2, 2]) == pytest.approx(np.std(lists, ddof=1) / math.sqrt(2))
    assert math.isnan(stderr([1] * 6))  # one list alone


def test_greedy_answers_are_the_same_each_time_and_end_where_the_limit_is(policy: TrainingClient) -> None:
    renderer = Renderer.load("tiny-llama")
    client = ReconnectableClient.from_training_client(policy)
    answers = [Answers(renderer, ["Hello?"], 8).of(client) for _ in range(2)]
    assert answers[0] == answers[1]
    assert 0 < len(answers[0]["Hello?"]) <= 8
