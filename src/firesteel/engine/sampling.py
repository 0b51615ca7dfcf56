"""Continuing a prompt through transformers' `generate`: enough to look at answers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from firesteel.engine.attention import using_attention
from firesteel.engine.models import BaseModel
from firesteel.sdk.errors import OperationError
from firesteel.sdk.types import ModelInput, SampledSequence, SamplingParams

TOKENS_AT_ONCE = 2**14
"""Of prompt and answers that are drawn together: each keeps its keys and values. More answers are drawn in turn."""


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
        torch.random.fork_rng(devices=[base.network.device] if base.device == "cuda" else []),
        using_attention(base.network, base.native_attention),
        _own_settings_only(base.network),
    ):
        # Without a seed each call draws anew; the process's own random state moves in neither case. `manual_seed` of
        # torch would reach out to every GPU.
        _generator(base.network.device).manual_seed(
            secrets.randbits(63) if params.seed is None else params.seed
        )
        if params.temperature == 0:
            return _answers(base.network, ids, params, stop, 1) * num_samples  # always the same
        at_once = max(1, TOKENS_AT_ONCE // (len(tokens) + params.max_tokens))
        sizes = [min(at_once, num_samples - start) for start in range(0, num_samples, at_once)]
        return [answer for size in sizes for answer in _answers(base.network, ids, params, stop, size)]


def _answers(
    network: PreTrainedModel, ids: torch.Tensor, params: SamplingParams, stop: list[int], count: int
) -> list[SampledSequence]:
    """So many answers, drawn together."""
    chosen = _ChosenLogprobs()
    sequences = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_generation_config(params, stop, count),
        logits_processor=LogitsProcessorList([*_warpers(params), chosen]),
    )
    scored = chosen.of(sequences)
    rows = zip(sequences[:, ids.shape[1] :].tolist(), scored.tolist(), strict=True)
    return [_cut(answer, scores, stop) for answer, scores in rows]


class _ChosenLogprobs(LogitsProcessor):  # type: ignore[misc]
    """The log-probability of each token that is drawn. `generate` would keep those of the whole vocabulary."""

    def __init__(self) -> None:
        self._of_this_step: torch.Tensor | None = None
        self._chosen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called with what was drawn before, and the scores that the next is drawn by."""
        self._take(input_ids)
        self._of_this_step = scores.float().log_softmax(dim=-1)
        return scores

    def of(self, sequences: torch.Tensor) -> torch.Tensor:
        """``[samples, steps]``, once all is drawn."""
        self._take(sequences)
        return torch.stack(self._chosen, dim=1)

    def _take(self, sequences: torch.Tensor) -> None:
        if self._of_this_step is not None:
            self._chosen.append(self._of_this_step.gather(1, sequences[:, -1:])[:, 0])


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    """What `generate` would make of these settings itself, but behind every processor of ours."""
    if params.temperature == 0:
        return []
    warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
    return warpers + ([TopPLogitsWarper(params.top_p)] if params.top_p < 1 else [])


def _generator(device: torch.device) -> torch.Generator:
    """What draws on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


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
    as_warped = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # see _warpers
    return GenerationConfig(
        max_new_tokens=params.max_tokens,
        num_return_sequences=num_samples,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else None,
        **(as_warped if params.temperature > 0 else {"do_sample": False}),
    )


def _cut(tokens: list[int], scores: list[float], stop: list[int]) -> SampledSequence:
    """One answer up to and including the token that stopped it."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    length = ends[0] + 1 if ends else len(tokens)
    return SampledSequence("stop" if ends else "length", tokens[:length], scores[:length])
