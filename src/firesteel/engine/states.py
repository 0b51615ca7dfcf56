"""What training goes on from, as a folder: trained weights, optimizer, and what they belong to.

::

    weights.safetensors      adapter or all weights, by name
    optimizer.safetensors    AdamW's `step`, `exp_avg` and `exp_avg_sq` of each, as `<name>.exp_avg`
    state.json               the model they are of, and the environment that made them
    notes.json               the caller's own
    manifest.json            size and SHA-256 of each (`firesteel.sealed`)

There is no random state in it: training draws no random number once an adapter has its start, and sampling
leaves the process's own state alone.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from firesteel.sdk.errors import CheckpointError
from firesteel.sdk.types import LoraConfig
from firesteel.sealed import damage, new_folder, read_json

_FORMAT = 1
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS, OPTIMIZER, STATE, NOTES = "weights.safetensors", "optimizer.safetensors", "state.json", "notes.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


@dataclass(frozen=True)
class Environment:
    """What the last bits of a step depend on beside data and settings."""

    torch: str
    transformers: str
    threads: int
    processor: str
    """Machine and vector instructions: these choose the kernels."""

    @classmethod
    def of_this_process(cls) -> Environment:
        """As it is now."""
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return cls(torch.__version__, version("transformers"), torch.get_num_threads(), processor)

    def differences(self, now: Environment) -> tuple[str, ...]:
        """As `threads: 4, now 2`."""
        pairs = ((f.name, getattr(self, f.name), getattr(now, f.name)) for f in fields(Environment))
        return tuple(f"{name}: {then}, now {here}" for name, then, here in pairs if then != here)


@dataclass(frozen=True)
class Belonging:
    """The model that a state is of: another one is refused."""

    base_model: str
    base_weights: str | None
    """SHA-256 of the frozen base under an adapter; None where all weights are in the state."""
    lora: Mapping[str, Any] | None
    dtype: str

    def refuse_other(self, saved: Belonging) -> None:
        """Raise `CheckpointError` unless a state is of this model. A base may have another name, if it is the same."""
        for name in ("lora", "base_weights", "dtype"):
            ours, theirs = getattr(self, name), getattr(saved, name)
            if ours != theirs:
                raise CheckpointError(
                    f"the checkpoint is of {saved.base_model} with {name} {theirs}, this model is "
                    f"{self.base_model} with {name} {ours}"
                )


@dataclass(frozen=True)
class TrainerState:
    """Copies of a trainer's tensors at one moment."""

    belonging: Belonging
    environment: Environment
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor] | None
    """None where it was not asked for."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        tensors = (*self.weights.values(), *(self.optimizer or {}).values())
        return sum(tensor.nbytes for tensor in tensors)


def write_state(state: TrainerState, target: Path, notes: Mapping[str, Any]) -> None:
    """Write a state to a new folder, whole or not at all. Raises `StorageError`."""
    described = {"format": _FORMAT, **asdict(state.belonging), "environment": asdict(state.environment)}
    small = json.dumps(dict(notes))
    with new_folder(target, state.bytes + len(small) + 2**16) as folder:
        folder.write(WEIGHTS, _safetensors(state.weights))
        folder.write(OPTIMIZER, _safetensors(state.optimizer or {}))
        folder.write_json(STATE, described)
        folder.write_json(NOTES, dict(notes))


def is_state(folder: Path) -> bool:
    """Whether a folder says that it is a saved state."""
    return (folder / STATE).exists()


def read_state(folder: Path, with_optimizer: bool) -> TrainerState:
    """Read a state, every byte of it compared with its hash. Raises `CheckpointError` naming what is wrong."""
    if problem := damage(folder, names=(WEIGHTS, OPTIMIZER, STATE)):
        raise CheckpointError(f"checkpoint {folder} is damaged: {problem}")
    try:
        described = dict(read_json(folder / STATE))
        if (found := described.pop("format")) != _FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {found}; this program reads format {_FORMAT}"
            )
        environment = Environment(**described.pop("environment"))
        belonging = Belonging(**described)
        weights = load_file(folder / WEIGHTS)
        optimizer = load_file(folder / OPTIMIZER) if with_optimizer else None
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error!r}") from error
    return TrainerState(belonging, environment, weights, optimizer)


def read_start(folder: Path, lora: LoraConfig | None) -> tuple[Belonging | None, Mapping[str, torch.Tensor]]:
    """The weights of a saved state, or of an adapter in PEFT's format, and what a state says it belongs to.

    Raises `CheckpointError` for a folder that is neither, or an adapter of other settings than `lora`.
    """
    if is_state(folder):
        state = read_state(folder, with_optimizer=False)
        return state.belonging, state.weights
    if lora is None or not (folder / ADAPTER_CONFIG).exists():
        wanted = f"a saved state ({STATE})" + ("" if lora is None else f" or an adapter ({ADAPTER_CONFIG})")
        raise CheckpointError(f"{folder} is not {wanted}")
    try:
        settings = read_json(folder / ADAPTER_CONFIG)
        _refuse_other_adapter(folder, settings, lora)
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"adapter {folder} cannot be read: {error}") from error
    return None, {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}


def _refuse_other_adapter(folder: Path, settings: Mapping[str, Any], lora: LoraConfig) -> None:
    plain = {"r": lora.rank, "lora_alpha": lora.alpha, "peft_type": "LORA", "bias": "none"}
    plain |= {"use_dora": False, "use_rslora": False, "modules_to_save": None}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}}
    for name, wanted in plain.items():
        if (settings.get(name, wanted) or wanted) != wanted:
            raise CheckpointError(
                f"adapter {folder} has {name} {settings[name]!r}, this model's has {wanted!r}; give the model the "
                "adapter's own lora_rank and lora_alpha"
            )


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors format, a tensor at a time.

    The library's own writer makes one more copy of all tensors and holds the interpreter while it writes: training
    would stand still. Its reader is what reads this.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
