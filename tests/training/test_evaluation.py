from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firesteel.sdk import DataError, TrainingClient
from training.utils import DpoObjective, ReconnectableClient, build_service_client
from training.utils.evaluation import Answers, evaluate, split_by_prompt
from training.utils.losses import PairLogprobs
from training.utils.pairs import PreferencePair, build_dpo_datums
from training.utils.rendering import Renderer, load_tokenizer


def make_pair(prompt: int, line: int) -> PreferencePair:
    sides = [[2, 3, 4 + prompt, side, 5 + line] for side in (100, 101)]
    return PreferencePair(*build_dpo_datums(sides[0], sides[1], 3), 3, line)


def prompt_of(pair: PreferencePair) -> int:
    return pair.chosen.model_input.to_ints()[2]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.floats(0, 0.9), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_of_a_split(prompts: list[int], fraction: float, seed: int) -> None:
    pairs = [make_pair(prompt, line) for line, prompt in enumerate(prompts)]
    if fraction and len(set(prompts)) < 2:
        with pytest.raises(DataError, match="eval_fraction: all pairs have one prompt"):
            split_by_prompt(pairs, fraction, seed)
        return
    split = split_by_prompt(pairs, fraction, seed)
    assert split.train
    assert {prompt_of(p) for p in split.train}.isdisjoint(prompt_of(p) for p in split.heldout)
    assert sorted(p.line for p in (*split.train, *split.heldout)) == list(range(len(pairs)))
    assert len(split.heldout) >= fraction * len(pairs) or len({prompt_of(p) for p in split.train}) == 1
    for side in (split.train, split.heldout):
        assert [p.line for p in side] == sorted(p.line for p in side)


def test_the_seed_draws_the_split() -> None:
    pairs = [make_pair(prompt, prompt) for prompt in range(40)]
    drawn = [tuple(p.line for p in split_by_prompt(pairs, 0.25, seed).heldout) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 10


@pytest.fixture
def policy() -> Iterator[TrainingClient]:
    with build_service_client(base_model="tiny-llama", lora_rank=0) as service:
        yield service.create_training_client()


def test_metrics_do_not_depend_on_the_batch_size(policy: TrainingClient) -> None:
    rng = np.random.default_rng(0)
    pairs = [make_pair(prompt, prompt) for prompt in range(7)]
    references = [PairLogprobs(*rng.normal(-5, 1, (2, 2)).astype(np.float32)) for _ in pairs]
    client = ReconnectableClient.from_training_client(policy)
    one, *others = [
        evaluate(client, pairs, references, DpoObjective(0.1), batch_size) for batch_size in (1, 3, 7)
    ]
    assert one["accuracy"] not in (0, 1)
    for other in others:
        assert other == pytest.approx(one, rel=1e-6, abs=1e-6)


def test_greedy_answers_are_the_same_each_time_and_end_where_the_limit_is(policy: TrainingClient) -> None:
    renderer = Renderer(load_tokenizer("tiny-llama"))
    client = ReconnectableClient.from_training_client(policy)
    answers = [Answers(renderer, ["Hello?"], 8).of(client) for _ in range(2)]
    assert answers[0] == answers[1]
    assert 0 < len(answers[0][0]) <= 8
