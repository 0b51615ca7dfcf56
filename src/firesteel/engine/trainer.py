"""One model on one rank: forward, backward, optimizer step, export. The only place with a backward pass.

A trainer sees data and micro-batch plans, never operations or queues. Gradients of all calls add; nothing
is divided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from firesteel.engine.adapters import Adapter, switch_adapter
from firesteel.engine.attention import using_attention
from firesteel.engine.logprobs import Asked, plain_logprobs, tree_logprobs
from firesteel.engine.losses import datum_loss
from firesteel.engine.models import BaseModel
from firesteel.engine.optimizer import Optimizer
from firesteel.engine.packing import MicroBatch
from firesteel.fetching import quiet_transformers
from firesteel.sdk.errors import ModelError, OperationError
from firesteel.sdk.types import AdamParams, Datum, FloatArray, IntArray, LoraConfig


@dataclass(frozen=True)
class Sequences:
    """The data of one call as arrays, and how they are cut into passes."""

    tokens: tuple[IntArray, ...]
    asked: tuple[Asked, ...]
    plan: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Scores:
    """What a pass gives: log-probabilities shaped like the targets, one array per datum, and the summed loss."""

    logprobs: tuple[FloatArray, ...]
    loss: float


# From one datum's log-probabilities (its index in the call first) to its share of the loss.
DatumLoss = Callable[[int, torch.Tensor], torch.Tensor]


class Trainer:
    """A policy (LoRA or all weights) or, with nothing to train, a frozen reference."""

    def __init__(self, base: BaseModel, name: str, lora: LoraConfig | None, trainable: bool) -> None:
        """`lora` adapts the base and leaves it frozen; without it a trainable trainer owns the base's weights."""
        self.base = base
        self._adapter = Adapter(base, name, lora) if lora and trainable else None
        self._optimizer: Optimizer | None = None
        self._lost_gradient: str | None = None
        self._added = False  # whether the running backward has changed the gradient
        if trainable:
            if self._adapter is None and base.network.dtype is torch.bfloat16:
                raise ModelError(
                    f"{base.name}: training all weights in bfloat16 rounds most steps away, and float32 master "
                    f"weights are not built yet; use a shape of dtype float32, or LoRA"
                )
            if self._adapter is None:
                base.network.requires_grad_(True)
            self._optimizer = Optimizer(self._trained_parameters())

    def forward(self, sequences: Sequences, loss: DatumLoss) -> Scores:
        """Score every target, without a gradient."""
        with torch.no_grad(), self._weights():
            return self._run(sequences, loss, backward=False)

    def forward_backward(self, sequences: Sequences, loss: DatumLoss) -> Scores:
        """Score every target and add the loss's gradient.

        If this fails after part of its gradient was added, all of the gradient is dropped, and so is what is
        added before the next `optim_step`, which is refused: half a gradient is not a gradient.
        """
        self._need_trainable("forward_backward")
        with self._weights(), self._all_or_nothing():
            return self._run(sequences, loss, backward=True)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """One AdamW step on the gradient added so far."""
        optimizer = self._need_trainable("optim_step")
        if self._lost_gradient is not None:
            reason, self._lost_gradient = self._lost_gradient, None
            optimizer.clear()  # what was added after the failure is a part only
            raise OperationError(
                f"optim_step: the gradient was dropped because a backward before it failed: {reason}; "
                f"send all data of this step again"
            )
        with self._weights():
            return optimizer.step(params)

    def write_weights(self, folder: Path) -> None:
        """Write an adapter in PEFT's format, or the whole model in Hugging Face's, into an empty folder."""
        if self._adapter is not None:
            self._adapter.write(folder)
        else:
            # Ours is not a name that others could load.
            with using_attention(self.base.network, self.base.native_attention), quiet_transformers():
                self.base.network.save_pretrained(folder)

    @property
    def adapted(self) -> bool:
        """Whether the policy is an adapter."""
        return self._adapter is not None

    @contextmanager
    def generating(self) -> Iterator[BaseModel]:
        """The model as it is now, for sampling: this trainer's weights on, no gradient."""
        with torch.no_grad(), self._weights():
            yield self.base

    def unload(self) -> None:
        """Leave the base as it was found."""
        if self._adapter is not None:
            self._adapter.remove()

    def _run(self, sequences: Sequences, loss: DatumLoss, backward: bool) -> Scores:
        logprobs: list[FloatArray] = [np.empty(0, np.float32)] * len(sequences.tokens)
        total = 0.0
        for batch in sequences.plan:
            for members, scored in self._passes(batch, sequences):
                share = torch.stack(
                    [loss(i, values) for i, values in zip(members, scored, strict=True)]
                ).sum()
                if backward and share.requires_grad:
                    self._added = True
                    share.backward()  # type: ignore[no-untyped-call]
                total += share.item()
                for index, values in zip(members, scored, strict=True):
                    logprobs[index] = values.detach().cpu().numpy()
        return Scores(tuple(logprobs), total)

    def _passes(
        self, batch: MicroBatch, sequences: Sequences
    ) -> Iterator[tuple[tuple[int, ...], list[torch.Tensor]]]:
        """The passes of one micro-batch: one over its tree, or one per sequence where trees cannot be used."""
        network, head = self.base.network, self.base.head
        if self.base.attention == "tree":
            asked = [sequences.asked[i] for i in batch.members]
            yield batch.members, tree_logprobs(network, batch.tree, asked, head)
            return
        for index in batch.members:
            tokens, asked_here = sequences.tokens[index], sequences.asked[index]
            yield (index,), [plain_logprobs(network, tokens, asked_here, head)]

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """This trainer's weights: its adapter on, or every adapter of the base off."""
        if self._adapter is None:
            switch_adapter(self.base.network, None)
        with self._adapter.active() if self._adapter is not None else nullcontext():
            yield

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        self._added = False
        try:
            yield
        except BaseException as error:
            if self._optimizer is not None and self._added:
                self._optimizer.clear()
                self._lost_gradient = f"{type(error).__name__}: {error}"
            raise

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        if self._adapter is not None:
            return list(self._adapter.parameters().values())
        return list(self.base.network.parameters())

    def _need_trainable(self, operation: str) -> Optimizer:
        if self._optimizer is None:
            raise OperationError(f"{operation}: this model is a frozen reference; it only runs forward")
        return self._optimizer


def built_in_loss(name: str, data: Sequence[Datum], settings: Mapping[str, float] | None) -> DatumLoss:
    """A built-in loss over this call's data."""
    return lambda index, logprobs: datum_loss(name, logprobs, data[index], settings)


def linear_loss(dloss_dlogprob: Sequence[FloatArray]) -> DatumLoss:
    """The loss whose gradient with respect to the log-probabilities is given: Σ g · logprob.

    Its parameter gradient is that of any loss with this derivative, by the chain rule.
    """

    def loss(index: int, logprobs: torch.Tensor) -> torch.Tensor:
        gradient = torch.from_numpy(np.ascontiguousarray(dloss_dlogprob[index]))
        return (gradient.to(logprobs.device, logprobs.dtype) * logprobs).sum()

    return loss
