"""Gradients: those of the plain path, whatever is shared, cut or added up; and never half of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trainers import (
    clear,
    full_trainer,
    gradients,
    load,
    lora_trainer,
    pair,
    relative_difference,
    sequences,
    spread_lora,
    trained_parameters,
)
from transformers import PreTrainedModel

from conftest import ARCHITECTURES, VOCABULARY, make_datum, make_pairs
from firesteel.engine.trainer import DatumLoss, Retained, Trainer, built_in_loss
from firesteel.sdk import AdamParams, Datum, ModelInput, OperationError
from firesteel.sdk.types import TensorData
from plain import load_plain, norms_in_own_dtype, plain_logprobs

PRECISIONS = {"float64": 1e-10, "float32": 1e-5}
BETA = 0.3


def cross_entropy(data: Sequence[Datum]) -> DatumLoss:
    return built_in_loss("cross_entropy", data, None)


def gradient_of(
    trainer: Trainer, data: Sequence[Datum], loss: DatumLoss | None = None, budget: int = 1024
) -> dict[str, torch.Tensor]:
    """The gradient of one call by itself; the trainer has none afterwards."""
    clear(trainer)
    trainer.forward_backward(sequences(data, budget), loss or cross_entropy(data))
    result = gradients(trainer)
    clear(trainer)
    return result


def added(one: dict[str, torch.Tensor], factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: gradient * factor for name, gradient in one.items()}


def reweighted(datum: Datum, factor: float) -> Datum:
    weights = datum.loss_fn_inputs["weights"].to_numpy() * np.float32(factor)
    return Datum(datum.model_input, {**datum.loss_fn_inputs, "weights": weights})


def masked_sum(logprobs: torch.Tensor, datum: Datum) -> torch.Tensor:
    return (logprobs * datum.loss_fn_inputs["weights"].to_torch().to(logprobs.dtype)).sum()


def dpo(
    logprobs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], data: Sequence[Datum]
) -> torch.Tensor:
    """DPO's loss summed over the pairs, written out here a second time: chosen and rejected in turn."""
    ratio = [masked_sum(p - r, d) for p, r, d in zip(logprobs, reference, data, strict=True)]
    margins = torch.stack(ratio[::2]) - torch.stack(ratio[1::2])
    return -F.logsigmoid(BETA * margins).sum()


def dpo_step(
    trainer: Trainer, data: Sequence[Datum], loss: Callable[[list[torch.Tensor]], torch.Tensor]
) -> float:
    """A forward, the loss on its log-probabilities as a client computes it, and the backward; the loss."""
    scores, retained = trainer.forward_retained(sequences(data), cross_entropy(data))
    leaves = [torch.from_numpy(values.copy()).requires_grad_() for values in scores.logprobs]
    value = loss(leaves)
    value.backward()
    trainer.backward(retained, [leaf.grad.numpy() for leaf in leaves])
    return value.item()


def reference_of(data: Sequence[Datum], seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d.model_input.length, generator=generator) * 0.3 - 5 for d in data]


def policy(folder: Path | str, kind: str, dtype: str = "float32") -> Trainer:
    if kind == "full":
        return full_trainer(folder, dtype)
    trainer = lora_trainer(load(folder, dtype))
    spread_lora(trainer)
    return trainer


def as_plain(trainer: Trainer) -> Trainer:
    """The same policy on the path of architectures that no tree can serve."""
    trainer.base.network.config._attn_implementation = trainer.base.native_attention
    trainer.base = replace(trainer.base, attention="plain")
    return trainer


def plain_gradient(network: PreTrainedModel, data: Sequence[Datum]) -> dict[str, torch.Tensor]:
    for datum in data:
        (-masked_sum(plain_logprobs(network, datum), datum)).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


# The same gradient as the plain path


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_prefix_gives_the_gradient_of_separate_sequences(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, dtype: str
) -> None:
    folder = model_folders[name]
    data = make_pairs(rng, 3)
    # Prompts are scored too: several sequences then pull at one shared position.
    data += [make_datum(np.asarray([*d.model_input.to_ints(), 7]), 1) for d in data[:2]]
    with norms_in_own_dtype() if dtype == "float64" else nullcontext():
        ours = gradient_of(full_trainer(folder, dtype), data)
        plain = plain_gradient(load_plain(folder, getattr(torch, dtype)), data)
    assert relative_difference(plain, ours) <= PRECISIONS[dtype]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shared_prefix_gives_an_adapter_the_gradient_of_separate_sequences(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, dtype: str
) -> None:
    """The plain path knows no adapter: its gradient G of a weight W gives BᵀG and GAᵀ, times alpha / rank."""
    folder = model_folders[name]
    data = make_pairs(rng, 3)
    with norms_in_own_dtype() if dtype == "float64" else nullcontext():
        trainer = policy(folder, "lora", dtype)
        ours = gradient_of(trainer, data)
        adapter = {n: p.detach() for n, p in trained_parameters(trainer).items()}
        scale = 8.0 / 4
        plain = load_plain(folder, getattr(torch, dtype))
        layers = {n.split(".lora_A.")[0] for n in adapter if ".lora_A." in n}
        with torch.no_grad():
            for layer in layers:
                plain.get_submodule(layer).weight += (
                    scale * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
                )
        whole = plain_gradient(plain, data)
    expected = {}
    for layer in layers:
        a, b = (f"{layer}.lora_{side}.weight" for side in "AB")
        expected[a] = scale * adapter[b].T @ whole[f"{layer}.weight"]
        expected[b] = scale * whole[f"{layer}.weight"] @ adapter[a].T
    assert relative_difference(expected, ours) <= PRECISIONS[dtype]


@pytest.mark.parametrize("budget", [1, 10**6], ids=["forward runs again", "graph is kept"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dpo_through_forward_and_backward_is_autograd_through_the_plain_model(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, budget: int
) -> None:
    data = make_pairs(rng, 4)
    reference = reference_of(data)
    trainer = full_trainer(model_folders[name], activation_token_budget=budget)
    loss = dpo_step(trainer, data, lambda leaves: dpo(leaves, reference, data) / 4)

    plain = load_plain(model_folders[name])
    direct = dpo([plain_logprobs(plain, d) for d in data], reference, data) / 4
    direct.backward()
    assert abs(loss - direct.item()) <= 1e-5
    expected = {n: p.grad for n, p in plain.named_parameters()}
    assert relative_difference(expected, gradients(trainer)) <= 1e-5


def test_a_pair_that_differs_in_its_first_answer_token_only_is_learnt_from(
    llama_folder: str, rng: np.random.Generator
) -> None:
    prompt = rng.integers(2, VOCABULARY, 10)
    data = [make_datum(np.append(prompt, last), 10) for last in (30, 31)]
    data[1] = reweighted(data[1], -1)
    plain = plain_gradient(load_plain(llama_folder), data)
    ours = gradient_of(full_trainer(llama_folder), data)
    assert float(sum(g.square().sum() for g in ours.values())) > 1e-4
    assert relative_difference(plain, ours) <= 1e-5


# The kept graph


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "plain path"])
def test_a_kept_graph_gives_the_gradient_of_a_second_forward_to_the_bit(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, kind: str
) -> None:
    data = make_pairs(rng, 5)
    trainer = policy(model_folders["llama" if name == "plain path" else name], kind)
    if name == "plain path":
        trainer = as_plain(trainer)
    call = sequences(data, 50)
    assert len(call.plan) > 1
    slopes = [rng.normal(size=d.model_input.length).astype(np.float32) for d in data]
    scores, kept = trainer.forward_retained(call, cross_entropy(data))
    assert kept.graph is not None
    trainer.backward(kept, slopes)
    ours = gradients(trainer)
    clear(trainer)
    assert not kept.graph  # used up: its memory is free
    trainer.backward(Retained(call, None), slopes)
    again = gradients(trainer)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    fresh = trainer.forward(call, cross_entropy(data))
    assert all(np.array_equal(one, two) for one, two in zip(scores.logprobs, fresh.logprobs, strict=True))


def test_the_model_runs_once_under_the_budget_and_twice_over_it(
    llama_folder: str, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_pairs(rng, 2)
    tokens = sum(len(batch.tree.tokens) for batch in sequences(data).plan)
    for budget, expected, told in ((tokens, 1, "is kept"), (tokens - 1, 2, "run again")):
        trainer = full_trainer(llama_folder, activation_token_budget=budget)
        runs: list[bool] = []
        trainer.base.network.base_model.register_forward_hook(
            lambda *_, runs=runs: runs.append(torch.is_grad_enabled())
        )
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="firesteel"):
            for _ in range(3):
                runs.clear()
                dpo_step(trainer, data, lambda leaves: sum(leaf.sum() for leaf in leaves))
                assert len(runs) == expected
                assert runs[-1]  # the last of them has the graph, a first of two has none
                assert expected == 1 or not runs[0]
        assert [told in message for message in caplog.messages] == [True]  # once, not at each step
        assert f"{tokens} tokens" in caplog.text


def test_graphs_that_are_still_kept_count_against_the_budget(
    llama_folder: str, rng: np.random.Generator
) -> None:
    data = make_pairs(rng, 2)
    tokens = sum(len(batch.tree.tokens) for batch in sequences(data).plan)
    trainer = full_trainer(llama_folder, activation_token_budget=2 * tokens - 1)
    _, first = trainer.forward_retained(sequences(data), cross_entropy(data))
    assert first.tokens == tokens
    _, second = trainer.forward_retained(sequences(data), cross_entropy(data), held_tokens=first.tokens)
    assert (second.graph, second.tokens) == (None, 0)


def test_a_call_says_what_it_made_the_model_compute(llama_folder: str, rng: np.random.Generator) -> None:
    data = pair(rng, prompt=12, chosen=8, rejected=6) + pair(rng, prompt=12, chosen=8, rejected=6)
    trainer = full_trainer(llama_folder)
    work = trainer.forward(sequences(data, 30), cross_entropy(data)).work
    assert work.tokens == 2 * (12 + 8 - 1 + 12 + 6 - 1)
    assert work.computed_tokens == 2 * (12 + 7 + 5)
    assert (work.passes, work.activation_bytes) == (2, 0)


def test_the_activation_peak_is_what_is_kept_for_a_backward(
    llama_folder: str, rng: np.random.Generator
) -> None:
    data = make_pairs(rng, 4)
    call = sequences(data, 1)
    per_pass, whole = full_trainer(llama_folder), full_trainer(llama_folder)
    one_pass = per_pass.forward_backward(call, cross_entropy(data)).work
    scores, retained = whole.forward_retained(call, cross_entropy(data))
    assert one_pass.passes == scores.work.passes == 4
    assert 0 < one_pass.activation_bytes < scores.work.activation_bytes < 4.5 * one_pass.activation_bytes
    # Each hidden state is kept at least once, and each weight not at all.
    hidden = sum(scores.work.computed_tokens * 4 * 32 for _ in range(2))
    assert scores.work.activation_bytes > hidden
    trainable = sum(p.numel() * 4 for p in whole.base.network.parameters())
    small = full_trainer(llama_folder)
    tiny = [make_datum(np.array([3, 4]), 1)]
    assert small.forward_backward(sequences(tiny), cross_entropy(tiny)).work.activation_bytes < trainable / 2
    whole.backward(retained, [np.ones(d.model_input.length, np.float32) for d in data])
    again = whole.forward(call, cross_entropy(data)).work
    assert again.activation_bytes == scores.work.activation_bytes  # the most so far


def test_what_a_failed_call_kept_does_not_count(llama_folder: str, rng: np.random.Generator) -> None:
    data = make_pairs(rng, 2)
    calm, failed = full_trainer(llama_folder), full_trainer(llama_folder)
    with pytest.raises(ZeroDivisionError):
        failed.forward_backward(sequences(data), failing_at(data, 0))
    works = [t.forward_backward(sequences(data), cross_entropy(data)).work for t in (calm, failed)]
    assert works[0].activation_bytes == works[1].activation_bytes > 0


# Who divides: nobody here


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_token_budget_does_not_change_the_gradient(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, kind: str
) -> None:
    data = make_pairs(rng, 5)
    passes = [len(sequences(data, budget).plan) for budget in (1, 50, 10**6)]
    assert passes[0] == 5 > passes[1] > passes[2] == 1
    trainer = policy(model_folders[name], kind)
    whole = gradient_of(trainer, data, budget=10**6)
    assert relative_difference(whole, gradient_of(trainer, data, budget=50)) <= 1e-5
    assert relative_difference(whole, gradient_of(trainer, data, budget=1)) <= 1e-5


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("split", [(8,), (2, 2, 2, 2), (3, 3, 2), (1,) * 8])
def test_calls_that_divide_by_the_count_of_the_step_add_up_to_one_call(
    llama_folder: str, rng: np.random.Generator, kind: str, split: tuple[int, ...]
) -> None:
    data = make_pairs(rng, 8)
    reference = reference_of(data)
    trainer = policy(llama_folder, kind)

    def call(start: int, end: int) -> None:
        part, frozen = data[2 * start : 2 * end], reference[2 * start : 2 * end]
        dpo_step(trainer, part, lambda leaves: dpo(leaves, frozen, part) / 8)

    call(0, 8)
    whole = gradients(trainer)
    clear(trainer)
    start = 0
    for pairs in split:
        call(start, start + pairs)
        start += pairs
    assert relative_difference(whole, gradients(trainer)) <= 1e-5


def test_a_gradient_is_linear_in_the_weights(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), pair(rng)
    once = gradient_of(trainer, data)
    tenfold = gradient_of(trainer, [reweighted(d, 10) for d in data])
    opposite = gradient_of(trainer, [reweighted(d, -1) for d in data])
    nothing = gradient_of(trainer, [reweighted(d, 0) for d in data])
    assert relative_difference(added(once, 10), tenfold) <= 1e-6
    assert relative_difference(added(once, -1), opposite) == 0
    assert all(not gradient.any() for gradient in nothing.values())


def test_the_same_datum_twice_gives_twice_its_gradient(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), pair(rng)[:1]
    once = gradient_of(trainer, data)
    assert relative_difference(added(once, 2), gradient_of(trainer, data * 2)) <= 1e-6
    for _ in range(2):
        trainer.forward_backward(sequences(data), cross_entropy(data))
    assert relative_difference(added(once, 2), gradients(trainer)) <= 1e-6


def test_unscored_tokens_behind_an_answer_change_nothing(llama_folder: str, rng: np.random.Generator) -> None:
    # A mean over tokens anywhere would show here.
    trainer, data = full_trainer(llama_folder), pair(rng)
    first = data[0]
    tail = rng.integers(2, VOCABULARY, 5)
    inputs = {
        "target_tokens": np.concatenate([first.loss_fn_inputs["target_tokens"].to_numpy(), tail]),
        "weights": np.concatenate([first.loss_fn_inputs["weights"].to_numpy(), np.zeros(5, np.float32)]),
    }
    longer = Datum(ModelInput.from_ints([*first.model_input.to_ints(), *tail]), inputs)
    assert relative_difference(gradient_of(trainer, data), gradient_of(trainer, [longer, data[1]])) <= 1e-5


def test_the_loss_of_a_call_is_the_sum_over_its_data(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), make_pairs(rng, 3)
    whole = trainer.forward(sequences(data), cross_entropy(data))
    parts = [trainer.forward(sequences([d]), cross_entropy([d])).loss for d in data]
    plain = load_plain(llama_folder)
    by_hand = -sum(masked_sum(plain_logprobs(plain, d), d).item() for d in data)
    assert whole.loss == pytest.approx(sum(parts), rel=1e-5)
    assert whole.loss == pytest.approx(by_hand, rel=1e-5)


def test_a_forward_leaves_no_gradient(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), pair(rng)
    scores = trainer.forward(sequences(data), cross_entropy(data))
    assert gradients(trainer) == {}
    again = trainer.forward_backward(sequences(data), cross_entropy(data))
    assert scores.loss == again.loss
    assert all(np.array_equal(a, b) for a, b in zip(scores.logprobs, again.logprobs, strict=True))


def test_an_optimizer_step_uses_the_sum_as_it_is(llama_folder: str, rng: np.random.Generator) -> None:
    """With eps far above the gradient, Adam's first step is lr · g / eps: a rescaling would show."""
    big = 1e6
    for calls in (1, 3):
        trainer, data = full_trainer(llama_folder, "float64"), pair(rng)
        for _ in range(calls):
            trainer.forward_backward(sequences(data), cross_entropy(data))
        before = {n: p.detach().clone() for n, p in trained_parameters(trainer).items()}
        gradient = gradients(trainer)
        metrics = trainer.optim_step(AdamParams(learning_rate=big, eps=big))
        norm = float(sum(g.square().sum() for g in gradient.values())) ** 0.5
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        moved = {n: p.detach() - before[n] for n, p in trained_parameters(trainer).items()}
        assert relative_difference(added(gradient, -1), moved) <= 1e-4


def test_an_optimizer_step_clears_the_gradient(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), pair(rng)
    trainer.forward_backward(sequences(data), cross_entropy(data))
    trainer.optim_step(AdamParams())
    with pytest.raises(OperationError, match="no gradient"):
        trainer.optim_step(AdamParams())


# Never half a gradient


def failing_at(data: Sequence[Datum], fatal: int) -> DatumLoss:
    """A loss that raises when it comes to one datum."""
    loss = cross_entropy(data)

    def guarded(index: int, logprobs: torch.Tensor) -> torch.Tensor:
        if index == fatal:
            raise ZeroDivisionError("a loss that cannot be taken")
        return loss(index, logprobs)

    return guarded


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_half_a_gradient_is_dropped_and_the_next_step_is_refused_once(
    llama_folder: str, rng: np.random.Generator, kind: str
) -> None:
    trainer, data = policy(llama_folder, kind), make_pairs(rng, 3)
    expected = gradient_of(trainer, data)
    before = {n: p.detach().clone() for n, p in trained_parameters(trainer).items()}
    with pytest.raises(ZeroDivisionError):
        trainer.forward_backward(sequences(data, 1), failing_at(data, 2))  # the second of three passes
    assert gradients(trainer) == {}
    with pytest.raises(OperationError, match="a loss that cannot be taken"):
        trainer.optim_step(AdamParams())
    assert all(torch.equal(p, before[n]) for n, p in trained_parameters(trainer).items())

    trainer.forward_backward(sequences(data), cross_entropy(data))
    assert relative_difference(expected, gradients(trainer)) == 0
    trainer.optim_step(AdamParams())


def test_what_follows_a_lost_part_in_the_same_step_is_dropped_with_it(
    llama_folder: str, rng: np.random.Generator
) -> None:
    # A client that has sent all calls of a step before it reads the first error, then sends the step again.
    trainer, data = full_trainer(llama_folder), make_pairs(rng, 3)
    expected = gradient_of(trainer, data)
    with pytest.raises(ZeroDivisionError):
        trainer.forward_backward(sequences(data, 1), failing_at(data, 2))
    trainer.forward_backward(sequences(data[:2]), cross_entropy(data[:2]))
    with pytest.raises(OperationError, match="dropped"):
        trainer.optim_step(AdamParams())
    trainer.forward_backward(sequences(data), cross_entropy(data))
    assert relative_difference(expected, gradients(trainer)) == 0


def test_a_failure_before_anything_was_added_leaves_the_earlier_gradient(
    llama_folder: str, rng: np.random.Generator
) -> None:
    trainer, data = full_trainer(llama_folder), make_pairs(rng, 2)
    trainer.forward_backward(sequences(data), cross_entropy(data))
    earlier = gradients(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.forward_backward(sequences(data, 1), failing_at(data, 0))
    assert relative_difference(earlier, gradients(trainer)) == 0
    trainer.optim_step(AdamParams())


def test_a_failed_forward_leaves_the_earlier_gradient(llama_folder: str, rng: np.random.Generator) -> None:
    trainer, data = full_trainer(llama_folder), make_pairs(rng, 2)
    trainer.forward_backward(sequences(data), cross_entropy(data))
    earlier = gradients(trainer)
    with pytest.raises(ZeroDivisionError):
        trainer.forward(sequences(data, 1), failing_at(data, 2))
    assert relative_difference(earlier, gradients(trainer)) == 0
    trainer.optim_step(AdamParams())


def test_a_frozen_reference_only_runs_forward(llama_folder: str, rng: np.random.Generator) -> None:
    reference = Trainer(load(llama_folder), "reference", None, trainable=False)
    data = pair(rng)
    reference.forward(sequences(data), cross_entropy(data))
    for call in (
        lambda: reference.forward_backward(sequences(data), cross_entropy(data)),
        lambda: reference.optim_step(AdamParams()),
    ):
        with pytest.raises(OperationError, match="frozen reference"):
            call()


# Learning, in the large


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_small_step_widens_the_margin(llama_folder: str, rng: np.random.Generator, kind: str) -> None:
    trainer, data = policy(llama_folder, kind), pair(rng)
    reference = reference_of(data)

    before = dpo_step(trainer, data, lambda leaves: dpo(leaves, reference, data))
    trainer.optim_step(AdamParams(learning_rate=1e-4))
    assert dpo_step(trainer, data, lambda leaves: dpo(leaves, reference, data)) < before


def test_a_derivative_with_respect_to_several_targets_reaches_them(
    llama_folder: str, rng: np.random.Generator
) -> None:
    row = rng.integers(2, VOCABULARY, 6)
    wide = Datum(
        ModelInput.from_ints(row), {"target_tokens": TensorData(rng.integers(0, VOCABULARY, (6, 3)))}
    )
    derivative = rng.normal(size=(6, 3)).astype(np.float32)
    trainer, plain = full_trainer(llama_folder), load_plain(llama_folder)
    trainer.backward(Retained(sequences([wide]), None), [derivative])
    (plain_logprobs(plain, wide) * torch.from_numpy(derivative)).sum().backward()
    assert relative_difference({n: p.grad for n, p in plain.named_parameters()}, gradients(trainer)) <= 1e-5
