"""Sampling: transformers' own generation on the weights as they are, and nothing left behind."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import full_trainer, gradients, load, lora_trainer, pair, sequences, trained_parameters

from conftest import ARCHITECTURES, VOCABULARY, make_pairs
from firesteel.engine import sampling
from firesteel.engine.sampling import sample
from firesteel.engine.trainer import Trainer, built_in_loss
from firesteel.sdk import AdamParams, ModelInput, OperationError, SamplingParams
from firesteel.sdk.types import SampledSequence
from plain import load_plain, plain_logits

GREEDY = SamplingParams(max_tokens=12, temperature=0)


def continued(
    trainer: Trainer, prompt: list[int], params: SamplingParams, count: int = 1
) -> list[SampledSequence]:
    with trainer.generating() as base:
        return sample(base, ModelInput.from_ints(prompt), params, count)


@pytest.fixture
def prompt(rng: np.random.Generator) -> list[int]:
    return rng.integers(2, VOCABULARY, 9).tolist()


def train(trainer: Trainer, rng: np.random.Generator) -> None:
    data = make_pairs(rng, 2)
    trainer.forward_backward(sequences(data), built_in_loss("cross_entropy", data, None))
    trainer.optim_step(AdamParams(learning_rate=1e-2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_transformers_own(model_folders: dict[str, Path], prompt: list[int], name: str) -> None:
    ours = continued(full_trainer(model_folders[name]), prompt, GREEDY)[0]
    plain = load_plain(model_folders[name])
    theirs = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert ours.tokens == theirs.tolist()
    assert ours.stop_reason == ("stop" if ours.tokens[-1] == 1 else "length")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_of_greedy_tokens_are_those_of_the_plain_path(
    model_folders: dict[str, Path], prompt: list[int], name: str
) -> None:
    answer = continued(full_trainer(model_folders[name]), prompt, GREEDY)[0]
    with torch.no_grad():
        scores = plain_logits(load_plain(model_folders[name]), prompt + answer.tokens).log_softmax(dim=-1)
    read = scores[len(prompt) - 1 : -1]
    assert read.argmax(dim=-1).tolist() == answer.tokens
    expected = read.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert np.abs(np.asarray(answer.logprobs) - expected.numpy()).max() <= 1e-5


def test_log_probabilities_are_of_the_distribution_sampled_from(llama_folder: str, prompt: list[int]) -> None:
    answer = continued(
        full_trainer(llama_folder), prompt, SamplingParams(max_tokens=6, temperature=0.5, seed=1)
    )[0]
    with torch.no_grad():
        logits = plain_logits(load_plain(llama_folder), prompt + answer.tokens)[len(prompt) - 1 : -1]
    expected = (logits / 0.5).log_softmax(dim=-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert np.abs(np.asarray(answer.logprobs) - expected.numpy()).max() <= 1e-5


def test_a_seed_reproduces_an_answer(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)

    def draw(seed: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=10, temperature=1.5, seed=seed)
        return [answer.tokens for answer in continued(trainer, prompt, params, 3)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len({tuple(tokens) for tokens in draw(7)}) == 3


def test_many_answers_are_drawn_in_turns_and_each_is_another(
    llama_folder: str, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "TOKENS_AT_ONCE", 2 * (len(prompt) + 12))
    trainer = full_trainer(llama_folder)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=1)
    answers, again = (continued(trainer, prompt, params, 5) for _ in range(2))
    assert answers == again
    assert len({tuple(answer.tokens) for answer in answers}) == 5
    assert answers[:2] == continued(trainer, prompt, params, 2)


def test_of_the_whole_vocabulary_nothing_is_kept_for_longer_than_a_step(
    llama_folder: str, prompt: list[int]
) -> None:
    alive: list[int] = []

    def count(module: torch.nn.Module, *_: object) -> None:
        # The head's output of this step, and what was made of that of the step before.
        sizes = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape[-1:] == (VOCABULARY,)]
        alive.append(len(sizes))

    trainer = full_trainer(llama_folder)
    handle = trainer.base.network.register_forward_hook(count)
    continued(trainer, prompt, SamplingParams(max_tokens=40, temperature=1.0, seed=1), 3)
    handle.remove()
    assert len(alive) == 40
    assert max(alive[1:]) == min(alive[1:])


def test_without_a_seed_every_call_draws_anew(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    params = SamplingParams(max_tokens=12, temperature=1.5)
    answers = [tuple(continued(trainer, prompt, params)[0].tokens) for _ in range(3)]
    assert len(set(answers)) == 3


def test_sampling_draws_no_number_of_the_process(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    for seed in (None, 3):
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        continued(trainer, prompt, SamplingParams(max_tokens=4, seed=seed))
        assert torch.equal(torch.rand(3), expected)


def test_top_k_of_one_is_greedy_at_any_temperature(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    hot = SamplingParams(max_tokens=12, temperature=2.0, top_k=1, seed=5)
    assert continued(trainer, prompt, hot)[0].tokens == continued(trainer, prompt, GREEDY)[0].tokens


def test_top_p_keeps_the_likeliest_tokens_only(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    narrow = SamplingParams(max_tokens=1, top_p=0.3, seed=0)
    drawn = {answer.tokens[0] for answer in continued(trainer, prompt, narrow, 64)}
    with torch.no_grad():
        chances = plain_logits(load_plain(llama_folder), prompt)[-1].softmax(dim=-1).sort(descending=True)
    nucleus = int((chances.values.cumsum(0) < 0.3).sum()) + 1
    assert drawn <= set(chances.indices[:nucleus].tolist())
    assert len(drawn) > 1


def test_a_stop_token_ends_the_answer_and_is_part_of_it(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    whole = continued(trainer, prompt, GREEDY)[0]
    assert whole.stop_reason == "length"
    stop = whole.tokens[4]
    first = whole.tokens.index(stop)
    cut = continued(trainer, prompt, SamplingParams(max_tokens=12, temperature=0, stop=(stop,)))[0]
    assert cut.tokens == whole.tokens[: first + 1]
    assert cut.stop_reason == "stop"
    assert len(cut.logprobs) == len(cut.tokens)
    assert np.allclose(cut.logprobs, whole.logprobs[: first + 1], atol=1e-5)


def test_each_of_several_answers_ends_at_its_own_stop_token(llama_folder: str, prompt: list[int]) -> None:
    stops = tuple(range(2, 40))
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=0, stop=stops)
    answers = continued(full_trainer(llama_folder), prompt, params, 8)
    assert len({len(answer.tokens) for answer in answers}) > 1
    for answer in answers:
        ends = [i for i, token in enumerate(answer.tokens) if token in (*stops, 1)]
        assert ends == ([len(answer.tokens) - 1] if answer.stop_reason == "stop" else [])
        assert np.isfinite(answer.logprobs).all()


def test_the_models_own_end_token_stops_too(llama_folder: str, prompt: list[int]) -> None:
    trainer = full_trainer(llama_folder)
    whole = continued(trainer, prompt, GREEDY)[0]
    trainer.base.network.generation_config.eos_token_id = whole.tokens[2]
    first = whole.tokens.index(whole.tokens[2])
    assert continued(trainer, prompt, GREEDY)[0].tokens == whole.tokens[: first + 1]


@pytest.mark.parametrize("length", [0, 120])
def test_a_prompt_that_leaves_no_room_is_refused(llama_folder: str, length: int) -> None:
    with pytest.raises(OperationError, match="1 to 128 tokens"):
        continued(full_trainer(llama_folder), [5] * length, GREEDY)


def test_a_policy_is_sampled_with_its_adapter_and_the_base_without(
    llama_folder: str, prompt: list[int], rng: np.random.Generator
) -> None:
    base = load(llama_folder)
    policy, reference = lora_trainer(base), Trainer(base, "reference", None, trainable=False)
    before = continued(reference, prompt, GREEDY)[0]
    assert continued(policy, prompt, GREEDY)[0] == before
    for _ in range(3):
        train(policy, rng)
    assert continued(policy, prompt, GREEDY)[0] != before
    assert continued(reference, prompt, GREEDY)[0] == before


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sampling_between_a_backward_and_its_step_changes_no_number(
    llama_folder: str, prompt: list[int], rng: np.random.Generator, kind: str
) -> None:
    data = [pair(rng) for _ in range(2)]

    def run(sampling: bool) -> tuple[list[np.ndarray], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        trainer = full_trainer(llama_folder) if kind == "full" else lora_trainer(load(llama_folder))
        scores = []
        for batch in data:
            loss = built_in_loss("cross_entropy", batch, None)
            scores += trainer.forward_backward(sequences(batch), loss).logprobs
            if sampling:
                continued(trainer, prompt, SamplingParams(max_tokens=5, seed=0), 2)
                continued(trainer, prompt, GREEDY)
            added = gradients(trainer)
            trainer.optim_step(AdamParams(learning_rate=1e-2))
        return scores, added, {n: p.detach().clone() for n, p in trained_parameters(trainer).items()}

    (scores, added, weights), (scores_too, added_too, weights_too) = run(False), run(True)
    assert all(np.array_equal(a, b) for a, b in zip(scores, scores_too, strict=True))
    assert added.keys() == added_too.keys()
    assert all(torch.equal(added[n], added_too[n]) for n in added)
    assert all(torch.equal(weights[n], weights_too[n]) for n in weights)


@pytest.mark.parametrize(
    "shipped",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"suppress_tokens": [5, 6]}],
    ids=lambda shipped: next(iter(shipped)),
)
def test_what_the_models_generation_file_sets_changes_no_answer(
    llama_folder: str, prompt: list[int], shipped: dict[str, object]
) -> None:
    trainer = full_trainer(llama_folder)
    plain = continued(trainer, prompt, GREEDY)
    for name, value in shipped.items():
        setattr(trainer.base.network.generation_config, name, value)
    assert continued(trainer, prompt, GREEDY) == plain
    assert all(getattr(trainer.base.network.generation_config, n) == v for n, v in shipped.items())
