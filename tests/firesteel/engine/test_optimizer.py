"""AdamW against ten lines of numpy, with settings that change from step to step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firesteel.engine.optimizer import Optimizer
from firesteel.sdk import AdamParams, OperationError


class NumpyAdamW:
    """Loshchilov and Hutter's algorithm 2; the bias correction is that of the present betas."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        self.weights = [w.copy() for w in weights]
        self.first = [np.zeros_like(w) for w in weights]
        self.second = [np.zeros_like(w) for w in weights]
        self.steps = 0

    def step(self, gradients: list[np.ndarray], p: AdamParams) -> None:
        self.steps += 1
        for i, g in enumerate(gradients):
            self.weights[i] *= 1 - p.learning_rate * p.weight_decay
            self.first[i] = p.beta1 * self.first[i] + (1 - p.beta1) * g
            self.second[i] = p.beta2 * self.second[i] + (1 - p.beta2) * g * g
            mean, variance = (
                self.first[i] / (1 - p.beta1**self.steps),
                self.second[i] / (1 - p.beta2**self.steps),
            )
            self.weights[i] -= p.learning_rate * mean / (np.sqrt(variance) + p.eps)


def parameters(rng: np.random.Generator, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape)).to(dtype))
        for shape in [(3, 4), (5,), (1,)]
    ]


def give(weights: list[torch.nn.Parameter], gradients: list[np.ndarray]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.from_numpy(gradient.copy()).to(weight.dtype)


def optimizer_of(weights: list[torch.nn.Parameter]) -> Optimizer:
    return Optimizer({str(place): weight for place, weight in enumerate(weights)})


def copies(weights: list[torch.nn.Parameter]) -> list[np.ndarray]:
    return [w.detach().numpy().copy() for w in weights]


adam_params = st.builds(
    AdamParams,
    learning_rate=st.floats(1e-5, 1e-1),
    beta1=st.floats(0.0, 0.95),
    beta2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(adam_params, min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_every_step_is_adamw_with_the_settings_that_came_with_it(steps: list[AdamParams], seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = parameters(rng)
    optimizer, expected = optimizer_of(weights), NumpyAdamW(copies(weights))
    for params in steps:
        gradients = [rng.normal(size=tuple(w.shape)) for w in weights]
        give(weights, gradients)
        metrics = optimizer.step(params)
        expected.step(gradients, params)
        assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum((g * g).sum() for g in gradients)), rel=1e-6)
        for ours, theirs in zip(copies(weights), expected.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def test_decay_is_decoupled_from_the_gradient(rng: np.random.Generator) -> None:
    # With a zero gradient all that is left of a step is w · (1 - lr · decay).
    weights = parameters(rng)
    before = copies(weights)
    give(weights, [np.zeros(tuple(w.shape)) for w in weights])
    optimizer_of(weights).step(AdamParams(learning_rate=0.1, weight_decay=0.5))
    for ours, was in zip(copies(weights), before, strict=True):
        np.testing.assert_allclose(ours, was * 0.95, rtol=1e-12)


def test_without_decay_a_zero_gradient_moves_nothing(rng: np.random.Generator) -> None:
    weights = parameters(rng)
    before = copies(weights)
    give(weights, [np.zeros(tuple(w.shape)) for w in weights])
    optimizer_of(weights).step(AdamParams(learning_rate=0.1))
    assert all(np.array_equal(a, b) for a, b in zip(copies(weights), before, strict=True))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_clipping_bounds_the_global_norm_and_reports_the_one_before(
    rng: np.random.Generator, scale: float
) -> None:
    weights = parameters(rng)
    optimizer, expected = optimizer_of(weights), NumpyAdamW(copies(weights))
    # eps far above the gradient: Adam would otherwise hide any scale.
    params = AdamParams(learning_rate=1.0, eps=10.0, grad_clip_norm=1.5)
    for _ in range(3):
        gradients = [rng.normal(size=tuple(w.shape)) * scale for w in weights]
        norm = np.sqrt(sum((g * g).sum() for g in gradients))
        give(weights, gradients)
        assert optimizer.step(params)["grad_norm"] == pytest.approx(norm, rel=1e-6)
        expected.step([g * min(1.0, 1.5 / norm) for g in gradients], params)
        for ours, theirs in zip(copies(weights), expected.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_clip_norm_of_zero_clips_nothing(rng: np.random.Generator) -> None:
    weights = parameters(rng)
    expected = NumpyAdamW(copies(weights))
    params = AdamParams(learning_rate=1.0, eps=1e3, grad_clip_norm=0.0)
    gradients = [rng.normal(size=tuple(w.shape)) * 1e3 for w in weights]
    give(weights, gradients)
    optimizer_of(weights).step(params)
    expected.step(gradients, params)
    for ours, theirs in zip(copies(weights), expected.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights_to_the_bit(
    rng: np.random.Generator, poison: float, clip: float
) -> None:
    weights = parameters(rng)
    optimizer, expected = optimizer_of(weights), NumpyAdamW(copies(weights))
    before = copies(weights)
    gradients = [rng.normal(size=tuple(w.shape)) for w in weights]
    gradients[1][2] = poison
    give(weights, gradients)
    with pytest.raises(OperationError, match=r"nan|inf"):
        optimizer.step(AdamParams(weight_decay=0.1, grad_clip_norm=clip))
    assert all(np.array_equal(a, b) for a, b in zip(copies(weights), before, strict=True))
    assert all(w.grad is None for w in weights)

    # Nor have the moments seen it: the next step is a first step.
    gradients = [rng.normal(size=tuple(w.shape)) for w in weights]
    give(weights, gradients)
    optimizer.step(AdamParams())
    expected.step(gradients, AdamParams())
    for ours, theirs in zip(copies(weights), expected.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


def test_a_step_without_a_gradient_is_refused(rng: np.random.Generator) -> None:
    weights = parameters(rng)
    before = copies(weights)
    with pytest.raises(OperationError, match="forward_backward first"):
        optimizer_of(weights).step(AdamParams(weight_decay=0.1))
    assert all(np.array_equal(a, b) for a, b in zip(copies(weights), before, strict=True))


def test_a_step_clears_the_gradient_it_used(rng: np.random.Generator) -> None:
    weights = parameters(rng)
    give(weights, [np.ones(tuple(w.shape)) for w in weights])
    optimizer = optimizer_of(weights)
    optimizer.step(AdamParams())
    assert all(w.grad is None for w in weights)
