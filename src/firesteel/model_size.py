"""How much room a model takes, by arithmetic: from the heads of its files and its configuration. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from firesteel.sdk.errors import ModelError
from firesteel.sealed import read_json

TRAINED_COPIES = 4
"""Of weights that are trained: themselves, their gradient, AdamW's two moments."""
STATE_COPIES = 3
"""Of these in a checkpoint: no gradient."""
ACTIVATION_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Tokens after sharing whose graphs are kept, by kind of device, where nothing else is asked for: measured, see
benchmarks/RESULTS.md."""
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_OUTSIDE_LAYERS = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters."""

    parameters: int
    per_rank: int
    """What an adapter of rank 1 on every linear layer of the body has."""
    activations_per_token: int
    """About how many numbers a backward needs kept for each token; 0 where the configuration does not say."""

    @classmethod
    def of(cls, folder: Path) -> ModelSize:
        """Of a folder in Hugging Face's format. Raises `ModelError` for a file that is not of weights."""
        shapes = {name: shape for path in _weights(folder) for name, shape in _shapes_in(path).items()}
        linear = [
            shape
            for name, shape in shapes.items()
            if len(shape) == 2 and not any(part in name for part in _OUTSIDE_LAYERS)
        ]
        return cls(
            sum(map(prod, shapes.values())), sum(map(sum, linear)), _activations(folder / "config.json")
        )


def parameters_of(folder: Path) -> int:
    """Number of parameters in a folder's files of weights."""
    return sum(prod(shape) for path in _weights(folder) for shape in _shapes_in(path).values())


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shapes_in(path: Path) -> dict[str, list[int]]:
    try:
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: entry["shape"] for name, entry in head.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path} is not a file of weights ({error!r}); fetch the model anew") from error


def _activations(config: Path) -> int:
    """A layer keeps eight vectors of the model's width, keys and values, and four of its feed-forward's width.

    Within a tenth of what was measured of SmolLM2-135M (benchmarks/RESULTS.md); other families differ a little.
    """
    try:
        content = read_json(config)
        width, layers, heads = (
            int(content[name]) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        head = int(content.get("head_dim") or width // heads)
        keys = head * int(content.get("num_key_value_heads") or heads)
        return layers * (8 * width + 2 * keys + 4 * int(content["intermediate_size"]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0
