"""The plain path: transformers' own forward, one unpadded sequence at a time, all logits. What `verify` compares with.

It shares no packing, no attention, no log-probability and no adapter code with the fast path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from firesteel.engine.adapters import peft_layers
from firesteel.engine.attention import using_attention
from firesteel.engine.logprobs import Asked
from firesteel.sdk.operations import PlainAttention
from firesteel.sdk.types import FloatArray, GradientSketch, IntArray

SKETCH_SIZE = 1024


@contextmanager
def plain_layers(network: PreTrainedModel, attention: PlainAttention) -> Iterator[None]:
    """The model's own attention, and peft's own adapters."""
    with using_attention(network, attention), peft_layers(network):
        yield


def plain_pass(network: PreTrainedModel, tokens: IntArray, asked: Asked) -> torch.Tensor:
    """Log-probabilities shaped like the targets, 0.0 at what was not asked for; with a graph if gradients are on."""
    logits = network(input_ids=torch.from_numpy(tokens)[None].to(network.device), use_cache=False).logits[0]
    rows = np.unique(asked.places // (asked.targets.size // len(tokens)))
    # In float32 the sum over a large vocabulary would be wrong by more than all that is compared here.
    wide = logits[torch.from_numpy(rows).to(logits.device)].double()
    targets = torch.from_numpy(asked.targets[rows]).to(logits.device)
    picked = wide.log_softmax(dim=-1).gather(1, targets.reshape(len(rows), -1)).reshape(targets.shape)
    if asked.scored is not None:
        picked = picked.where(torch.from_numpy(asked.scored[rows]).to(picked.device), picked.new_zeros(()))
    scores = picked.new_zeros(asked.targets.shape)
    placed: torch.Tensor = scores.index_copy(0, torch.from_numpy(rows).to(scores.device), picked)
    return placed


def sketch(parameters: Iterable[nn.Parameter]) -> GradientSketch:
    """The norm of the gradient added so far, and a random projection of it to `SKETCH_SIZE` numbers.

    Every entry of the gradient gets a random sign and is added to one of the numbers (a count sketch, Charikar,
    Chen and Farach-Colton 2002): the squared norm of the difference of two projections is on average that of the
    gradients' difference, and off by some 4 % in practice. The signs are the same in every call.
    """
    generator = torch.Generator().manual_seed(0)
    squares, projection = 0.0, np.zeros(SKETCH_SIZE)
    for parameter in parameters:
        # Drawn for one without a gradient, too: the next must get the signs that it gets on another path.
        shape = (parameter.numel(),)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        if parameter.grad is None:
            continue
        gradient = parameter.grad.detach().flatten().cpu()
        gradient = gradient if gradient.dtype is torch.float64 else gradient.float()
        squares += float(gradient.double().square().sum())
        signed = nn.functional.pad(gradient * signs, (0, -len(gradient) % SKETCH_SIZE))
        projection += signed.view(-1, SKETCH_SIZE).sum(0, dtype=torch.float64).numpy()
    return GradientSketch(squares**0.5, projection)


def pull(scores: Sequence[torch.Tensor], slopes: Sequence[FloatArray]) -> None:
    """Add the gradient of Σ slope · score."""
    outputs = [score for score in scores if score.requires_grad]
    given = [
        torch.from_numpy(np.ascontiguousarray(slope)).to(score.device, score.dtype)
        for score, slope in zip(scores, slopes, strict=True)
        if score.requires_grad
    ]
    if outputs:
        torch.autograd.backward(outputs, given)
