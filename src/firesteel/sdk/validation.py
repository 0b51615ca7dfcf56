"""What no trainer could run, or could only run by ignoring something, is refused before it is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real

import numpy as np

from firesteel.sdk.errors import ConfigError, OperationError
from firesteel.sdk.types import AdamParams, Datum, LoraConfig, SamplingParams

# What each built-in loss reads from `loss_fn_inputs` beside `target_tokens`, and the settings it takes
# with their defaults (None = must be given).
_LOSS_INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
    "cispo": ("logprobs", "advantages"),
    "dro": ("logprobs", "advantages"),
}
# One datum may serve several losses, so what another loss reads may stand beside; a misspelt name may not.
_KNOWN_INPUTS = ("target_tokens", "weights", "logprobs", "advantages")
LOSS_SETTINGS: dict[str, dict[str, float | None]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": None},
}


_LARGEST_SEED = 2**63 - 1  # what torch.manual_seed takes


def check_data(
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None = None,
    weighted_only: bool = False,
) -> None:
    """Refuse what no trainer could run, before it is sent.

    Raises `OperationError` naming the datum, the field, the lengths and what was expected.
    """
    if loss_fn not in _LOSS_INPUTS:
        raise OperationError(f"loss_fn: {loss_fn!r} is not one of {', '.join(_LOSS_INPUTS)}")
    if unknown := set(loss_fn_config or {}) - set(LOSS_SETTINGS[loss_fn]):
        known = ", ".join(LOSS_SETTINGS[loss_fn]) or "none"
        raise OperationError(
            f"loss_fn_config: {loss_fn} does not read {', '.join(sorted(unknown))} (it reads: {known})"
        )
    for name, default in LOSS_SETTINGS[loss_fn].items():
        if default is None and name not in (loss_fn_config or {}):
            raise OperationError(f"loss_fn_config: {loss_fn} needs {name!r}")
    for name, value in (loss_fn_config or {}).items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise OperationError(f"loss_fn_config: {name!r} is {value!r}, not a finite number")
    if not data:
        raise OperationError("data: empty; at least one datum is needed")
    for index, datum in enumerate(data):
        _check_datum(index, datum, loss_fn)
    if weighted_only:
        _check_weighted_only(data, loss_fn)


def _check_weighted_only(data: Sequence[Datum], loss_fn: str) -> None:
    if loss_fn != "cross_entropy":
        raise OperationError(
            f"weighted_only: {loss_fn} reads every log-probability, whatever its weight; only cross_entropy and "
            "custom losses can leave some out"
        )
    for index, datum in enumerate(data):
        if "weights" not in datum.loss_fn_inputs:
            raise OperationError(
                f"data[{index}].loss_fn_inputs: weighted_only needs 'weights': they say what is scored"
            )


def _check_datum(index: int, datum: Datum, loss_fn: str) -> None:
    length = datum.model_input.length
    if length == 0:
        raise OperationError(f"data[{index}].model_input: no tokens")
    inputs = datum.loss_fn_inputs
    for name in ("target_tokens", *_LOSS_INPUTS[loss_fn]):
        if name not in inputs:
            present = ", ".join(inputs) or "nothing"
            raise OperationError(
                f"data[{index}].loss_fn_inputs: {loss_fn} needs {name!r}; there is {present}"
            )
    if unknown := [name for name in inputs if name not in _KNOWN_INPUTS]:
        raise OperationError(
            f"data[{index}].loss_fn_inputs: no loss reads {', '.join(unknown)}; known are {', '.join(_KNOWN_INPUTS)}"
        )
    targets = inputs["target_tokens"]
    if targets.dtype != "int64":
        raise OperationError(
            f"data[{index}].loss_fn_inputs['target_tokens']: dtype {targets.dtype}, expected int64"
        )
    if not targets.shape or targets.shape[0] != length or not targets.to_numpy().size:
        raise OperationError(
            f"data[{index}].loss_fn_inputs['target_tokens']: shape {targets.shape} for {length} input tokens; "
            f"one target (or one row of targets) per input token is expected"
        )
    for name in ("weights", *_LOSS_INPUTS[loss_fn]):
        if name in inputs and inputs[name].shape != targets.shape:
            raise OperationError(
                f"data[{index}].loss_fn_inputs[{name!r}]: shape {inputs[name].shape} "
                f"for targets of shape {targets.shape}"
            )
        if name in inputs and not np.isfinite(inputs[name].to_numpy()).all():
            raise OperationError(f"data[{index}].loss_fn_inputs[{name!r}]: holds a value that is not finite")


def check_adam_params(params: AdamParams) -> None:
    """Refuse settings under which a step would damage the weights or do nothing sensible."""
    for name, value in asdict(params).items():
        below_one = name in ("beta1", "beta2")
        number = _finite(value)
        if not (number >= 0) or (below_one and number >= 1):
            expected = "a number from 0 to below 1" if below_one else "a finite number of 0 or more"
            raise OperationError(f"adam_params.{name}: {value!r}; expected {expected}")


def check_lora(config: LoraConfig) -> None:
    """Refuse an adapter that cannot be made, or would be another one than was asked for."""
    if not _is_whole(config.rank, least=1):
        raise ConfigError(
            f"lora_rank: {config.rank!r}; expected a whole number, 0 (train all weights) or more"
        )
    if not _is_whole(config.seed, least=0, most=_LARGEST_SEED):
        raise ConfigError(f"LoRA seed: {config.seed!r}; expected a whole number from 0 to {_LARGEST_SEED}")
    if not (_finite(config.alpha) > 0):
        raise ConfigError(f"lora_alpha: {config.alpha!r}; expected a finite number above 0")


def check_sampling(params: SamplingParams, num_samples: int) -> None:
    """Refuse settings that cannot be sampled with."""
    allowed = {
        "num_samples": (num_samples, _is_whole(num_samples, 1), "a whole number of 1 or more"),
        "max_tokens": (params.max_tokens, _is_whole(params.max_tokens, 1), "a whole number of 1 or more"),
        "temperature": (params.temperature, _finite(params.temperature) >= 0, "0 (greedy) or more"),
        "top_p": (params.top_p, 0 < _finite(params.top_p) <= 1, "above 0 and up to 1 (off)"),
        "top_k": (params.top_k, _is_whole(params.top_k, -1), "a whole number, -1 is off"),
        "seed": (
            params.seed,
            params.seed is None or _is_whole(params.seed, 0, _LARGEST_SEED),
            f"a whole number from 0 to {_LARGEST_SEED}",
        ),
    }
    for name, (value, is_allowed, expected) in allowed.items():
        if not is_allowed:
            raise OperationError(f"sample: {name}: {value!r}; expected {expected}")


def _finite(value: object) -> float:
    """The number, or NaN (with which every comparison is false) for what is no finite one."""
    number = float(value) if isinstance(value, Real) else math.nan
    return number if math.isfinite(number) else math.nan


def _is_whole(value: object, least: int, most: int | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return int(value) >= least and (most is None or int(value) <= most)
