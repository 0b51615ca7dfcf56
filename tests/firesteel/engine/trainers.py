"""Trainers on real tiny models, and data for them, as the engine's tests use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from conftest import VOCABULARY, make_datum
from firesteel.catalog import ModelEntry
from firesteel.engine.logprobs import Asked
from firesteel.engine.models import BaseModel, load_base
from firesteel.engine.packing import plan
from firesteel.engine.trainer import Sequences, Trainer
from firesteel.sdk import Datum, LoraConfig
from firesteel.sdk.shapes import Mode, TrainingShape

LORA = LoraConfig(rank=4, alpha=8.0)


def load(folder: Path | str, dtype: str = "float32") -> BaseModel:
    """The engine's own load of a folder."""
    shape = TrainingShape("test", "*", "cpu", dtype, Mode.POLICY_TRAINER)  # type: ignore[arg-type]
    return load_base("test-model", ModelEntry("test-model", str(folder)), Path(folder), shape)


def full_trainer(
    folder: Path | str, dtype: str = "float32", activation_token_budget: int | None = None
) -> Trainer:
    """A policy that trains all weights."""
    return Trainer(load(folder, dtype), "full", None, True, activation_token_budget)


def lora_trainer(base: BaseModel, name: str = "policy", config: LoraConfig = LORA) -> Trainer:
    """A LoRA policy on a base that others may share."""
    return Trainer(base, name, config, trainable=True)


def sequences(data: Sequence[Datum], token_budget: int = 1024) -> Sequences:
    """One call's data, planned as the engine plans it."""
    tokens = tuple(np.asarray(datum.model_input.to_ints(), np.int64) for datum in data)
    asked = tuple(Asked(datum.loss_fn_inputs["target_tokens"].to_numpy()) for datum in data)
    return Sequences(tokens, asked, plan(tokens, token_budget))


def pair(rng: np.random.Generator, prompt: int = 12, chosen: int = 8, rejected: int = 6) -> list[Datum]:
    """A chosen and a rejected datum behind one prompt."""
    shared = rng.integers(2, VOCABULARY, prompt)
    answers = (rng.integers(2, VOCABULARY, n) for n in (chosen, rejected))
    return [make_datum(np.concatenate([shared, answer]), prompt) for answer in answers]


def spread_lora(trainer: Trainer, seed: int = 0) -> None:
    """Give a fresh adapter a B that is not zero, so that both A and B have a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_of(trainer).parameters().values():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
            parameter.add_(drawn.to(parameter.device))


def adapter_of(trainer: Trainer):  # type: ignore[no-untyped-def]
    """The adapter of a LoRA policy."""
    assert trainer._adapter is not None
    return trainer._adapter


def trained_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """What this trainer trains, by name."""
    if trainer.adapted:
        return adapter_of(trainer).parameters()
    return dict(trainer.base.network.named_parameters())


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the gradient added so far."""
    return {n: p.grad.clone() for n, p in trained_parameters(trainer).items() if p.grad is not None}


def clear(trainer: Trainer) -> None:
    """Drop the gradient."""
    for parameter in trained_parameters(trainer).values():
        parameter.grad = None


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two whole gradients over the norm of the first."""
    assert one.keys() == other.keys()
    assert one
    difference = sum(float((one[n].double() - other[n].double()).square().sum()) for n in one)
    return (difference / sum(float(g.double().square().sum()) for g in one.values())) ** 0.5
