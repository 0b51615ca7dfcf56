"""The plain twin: what every fast path is compared with.

transformers' own forward, one unpadded sequence at a time, dense attention, full logits. It shares no
packing, attention or log-probability code with the engine, and imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from firesteel.sdk import Datum

EXACT_EAGER = "exact_eager"


def exact_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Dense causal attention that stays in the tensors' own dtype.

    transformers' "eager" takes its softmax in float32 whatever the model's dtype, so in a float64 model it
    is wrong from the 8th digit on and 1e-10 would compare rounding. In float32 the twin uses "eager" itself.
    No mask arrives here: transformers makes none for an attention it has no mask function for.
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ value
    return attended.transpose(1, 2), None


AttentionInterface.register(EXACT_EAGER, exact_eager)


def load_plain(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A load of its own, through transformers alone; dropout off, every weight with a gradient."""
    attention = EXACT_EAGER if dtype is torch.float64 else "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def plain_logits(network: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """All logits of one sequence, ``[n, vocabulary]``, with a graph if gradients are on."""
    return network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def plain_logprobs(network: PreTrainedModel, datum: Datum) -> torch.Tensor:
    """Log-probabilities of one datum's targets, shaped like them, with a graph if gradients are on."""
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    logits = plain_logits(network, datum.model_input.to_ints())
    # In float32, torch's sum over a large vocabulary is off by more than what is compared here (ADR 7).
    scores = logits.double().log_softmax(dim=-1).gather(1, targets.reshape(len(targets), -1))
    return scores.reshape(targets.shape).to(logits.dtype)


@contextmanager
def norms_in_own_dtype() -> Iterator[None]:
    """Llama's and Qwen2's RMSNorm in the tensors' own dtype, on both sides of a float64 comparison.

    transformers takes it in float32, and with it the gradient that passes through: each branch of a tree
    would then differ from its plain twin in the 8th digit, by transformers' rounding and not by ours.
    """

    def forward(self: LlamaRMSNorm | Qwen2RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    originals = {kind: kind.forward for kind in (LlamaRMSNorm, Qwen2RMSNorm)}
    for kind in originals:
        kind.forward = forward
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.forward = original
