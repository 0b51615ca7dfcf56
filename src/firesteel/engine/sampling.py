"""Continuing a prompt through transformers' `generate`: enough to look at answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from firesteel.engine.attention import using_attention
from firesteel.engine.models import BaseModel
from firesteel.sdk.errors import OperationError
from firesteel.sdk.types import ModelInput, SampledSequence, SamplingParams


def sample(
    base: BaseModel, prompt: ModelInput, params: SamplingParams, num_samples: int
) -> list[SampledSequence]:
    """Greedy at temperature 0, else by temperature, top-k and top-p; reproducible with a seed.

    Stops at `params.stop` and at the model's own end-of-sequence tokens.
    """
    tokens = prompt.to_ints()
    if not tokens or len(tokens) + params.max_tokens > base.max_context_length:
        raise OperationError(
            f"sample: {len(tokens)} prompt tokens and max_tokens={params.max_tokens}; "
            f"1 to {base.max_context_length} tokens in all are possible"
        )
    if not 0 <= min(tokens) <= max(tokens) < base.vocabulary:
        raise OperationError(f"sample: a prompt token is outside the {base.vocabulary} tokens of {base.name}")
    stop = _stop_tokens(base, params)
    ids = torch.tensor([tokens], device=base.network.device)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),  # all that `manual_seed` seeds
        using_attention(base.network, base.native_attention),
        _own_settings_only(base.network),
    ):
        # Without a seed each call draws anew; the process's own random state moves in neither case.
        torch.manual_seed(torch.seed() if params.seed is None else params.seed)
        output = base.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation_config(params, stop, num_samples if params.temperature > 0 else 1),
        )
    steps = torch.stack(output.scores, dim=1).float().log_softmax(dim=-1)
    answers = [
        _cut(answer, scores, stop)
        for answer, scores in zip(output.sequences[:, len(tokens) :], steps, strict=True)
    ]
    return answers if params.temperature > 0 else answers * num_samples  # greedy: always the same


@contextmanager
def _own_settings_only(network: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a call leaves open from the model's file: penalties, beams, suppressed tokens."""
    shipped = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = shipped


def _stop_tokens(base: BaseModel, params: SamplingParams) -> list[int]:
    own = base.network.generation_config.eos_token_id
    if own is None:
        own = base.network.config.get_text_config().eos_token_id
    own_ids = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*own_ids, *params.stop})


def _generation_config(params: SamplingParams, stop: list[int], num_samples: int) -> GenerationConfig:
    drawn = {
        "do_sample": True,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k > 0 else 0,
    }
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        num_return_sequences=num_samples,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else None,
        return_dict_in_generate=True,
        output_scores=True,
        **(drawn if params.temperature > 0 else {"do_sample": False}),
    )


def _cut(answer: torch.Tensor, scores: torch.Tensor, stop: list[int]) -> SampledSequence:
    """One answer up to and including the token that stopped it."""
    tokens = answer.tolist()
    ends = [i for i, token in enumerate(tokens) if token in stop]
    length = ends[0] + 1 if ends else len(tokens)
    chosen = scores[torch.arange(length), answer[:length]]
    return SampledSequence("stop" if ends else "length", tokens[:length], chosen.tolist())
