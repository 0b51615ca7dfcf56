"""Loading base models, and finding out which attention each can run on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from firesteel.catalog import ModelEntry
from firesteel.engine.attention import TREE_ATTENTION, using_attention
from firesteel.engine.head import HeadForm, head_form
from firesteel.engine.logprobs import Asked, plain_logprobs, tree_logprobs
from firesteel.engine.packing import pack
from firesteel.fetching import quiet_transformers
from firesteel.sdk.errors import ModelError
from firesteel.sdk.shapes import TrainingShape

logger = logging.getLogger("firesteel")

# Raised whenever a change of the engine changes a log-probability: cached references of before are not used then.
NUMERICS_VERSION = 3

# Settings of a configuration that say where a model came from, not what it computes.
_NOT_IDENTITY = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
}


@dataclass(frozen=True)
class BaseModel:
    """A loaded model whose weights are frozen unless a trainer owns it."""

    name: str
    origin: str
    """What other programs load it by: its Hugging Face id, or its folder."""
    folder: Path
    network: PreTrainedModel
    attention: Literal["tree", "plain"]
    head: HeadForm | None
    """What the head's output goes through to become logits; None = unknown: its own code makes all logits."""
    native_attention: str
    """transformers' own choice for this model: what sampling and plain passes use."""
    max_context_length: int
    """Tokens of a whole sequence."""

    @cached_property
    def identity(self) -> str:
        """`weights_identity` of a base that stays frozen, hashed once."""
        return weights_identity(self.network)

    @property
    def device(self) -> str:
        """The kind of device it is on."""
        return str(self.network.device.type)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that may be read or scored."""
        return int(self.network.get_input_embeddings().weight.shape[0])


def load_base(name: str, entry: ModelEntry, folder: Path, shape: TrainingShape) -> BaseModel:
    """Load a folder in Hugging Face's format on the shape's device and in its dtype, frozen, dropout off."""
    dtype = getattr(torch, shape.dtype)
    logger.info("loading %s on %s in %s", name, shape.device, shape.dtype)
    with quiet_transformers():
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=entry.trust_remote_code, use_safetensors=True
        )
    network.requires_grad_(False).eval().to(shape.device)
    native_attention = network.config._attn_implementation
    head = _known_head(name, network)
    reason = why_not_tree(network)
    if reason is None:
        network.config._attn_implementation = TREE_ATTENTION
    else:
        logger.warning("%s: %s; each sequence is computed by itself (slower, same numbers)", name, reason)
    return BaseModel(
        name=name,
        origin=entry.source if entry.kind == "hub" else str(folder),
        folder=folder,
        network=network,
        attention="plain" if reason else "tree",
        head=head,
        native_attention=native_attention,
        max_context_length=_context_length(name, network.config, shape),
    )


def add_embedding_rows_to_head(base: BaseModel) -> None:
    """Where embedding and head are one matrix, let the embedding's gradient be the rows that were read.

    As a matrix it would be filled with zeros and added to the head's, each as large as the vocabulary. On a GPU
    that is quick, and finding the rows would make the host wait.
    """
    embedding, head = base.network.get_input_embeddings(), base.network.get_output_embeddings()
    tied = head is not None and isinstance(embedding, nn.Embedding) and embedding.weight is head.weight
    if tied and base.device == "cpu":
        embedding.sparse = True


def on_shape(base: BaseModel, name: str, shape: TrainingShape) -> BaseModel:
    """The same weights under another name, with the limits of another shape of the same device and dtype."""
    return replace(base, name=name, max_context_length=_context_length(name, base.network.config, shape))


def longest_sequence(name: str, entry: ModelEntry, folder: Path, shape: TrainingShape) -> int:
    """Tokens of the longest sequence that a model takes on a shape, known before it is loaded."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=entry.trust_remote_code)
    return _context_length(name, config, shape)


def _context_length(name: str, config: PretrainedConfig, shape: TrainingShape) -> int:
    limits = [shape.max_context_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    known = [limit for limit in limits if limit]
    if not known:
        raise ModelError(
            f"{name}: its config.json has no max_position_embeddings; give the shape a max_context_length"
        )
    return min(known)


def why_not_tree(network: PreTrainedModel) -> str | None:
    """Why this architecture cannot run on a prefix tree, or None if it can.

    Sliding windows and layers other than plain attention are known by the configuration; whatever else may
    differ (soft-capping, own masks, keyword arguments that get lost) shows when a small tree is computed
    both ways.
    """
    return _unsuitable_layers(network.config.get_text_config()) or _wrong_on_a_small_tree(network)


def _unsuitable_layers(config: Any) -> str | None:
    # These choose their frequencies by the largest position of the whole input: in a packed row a short
    # sequence would be turned by the factors of its longest neighbour.
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds_of_rope = {str(rope.get("rope_type", rope.get("type"))) for rope in _rope_settings(ropes)}
    if by_length := kinds_of_rope & {"longrope", "dynamic", "su"}:
        return f"its position embedding depends on the length of the input ({', '.join(sorted(by_length))})"
    kinds = {kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"}
    window = getattr(config, "sliding_window", None)
    reaches_all = window is None or window >= config.max_position_embeddings
    if kinds == {"sliding_attention"} and reaches_all:
        kinds = set()
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if not reaches_all and getattr(config, "use_sliding_window", True):
        return f"it attends to a sliding window of {window} tokens"
    return None


def _rope_settings(ropes: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One mapping for the model, or one for each kind of layer."""
    nested = [value for value in ropes.values() if isinstance(value, Mapping)]
    return nested or [ropes]


def _known_head(name: str, network: PreTrainedModel) -> HeadForm | None:
    """The head's form, if the body and it give the model's own log-probabilities on a small text."""
    generator = np.random.default_rng(0)
    vocabulary = int(network.get_input_embeddings().weight.shape[0])
    tokens = generator.integers(0, vocabulary, 8)
    asked = Asked(generator.integers(0, vocabulary, (8, 16)))
    form = head_form(network.config)
    with torch.no_grad():
        own = plain_logprobs(network, tokens, asked, form=None)
        ours = _tried(lambda: plain_logprobs(network, tokens, asked, form))
    if isinstance(ours, Exception):
        reason = str(ours)
    else:
        # Both start from one state: they differ by rounding, in bfloat16 by that of the logits.
        tolerance = 1e-4 if network.dtype in (torch.float32, torch.float64) else 0.1
        difference = float((own - ours).abs().max())
        if difference <= tolerance * max(1.0, float(own.abs().max()) / 10):
            return form
        reason = f"its log-probabilities differ by {difference:.2g} from hidden states times head"
    logger.warning("%s: %s; all its logits are computed (more memory, same numbers)", name, reason)
    return None


def _tried(compute: Callable[[], torch.Tensor]) -> torch.Tensor | Exception:
    """What a way of computing gives, or why an architecture cannot be computed so: its own code always works."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  # whatever a foreign architecture lacks, it runs without
        return error


def _wrong_on_a_small_tree(network: PreTrainedModel) -> str | None:
    generator = np.random.default_rng(0)
    vocabulary = int(network.get_input_embeddings().weight.shape[0])
    prompt, one, two = (generator.integers(0, vocabulary, n, dtype=np.int64) for n in (5, 4, 3))
    sequences = [np.concatenate([prompt, one]), np.concatenate([prompt, two])]
    with torch.no_grad():
        plain = torch.cat([plain_logprobs(network, s, Asked(s), form=None) for s in sequences])
        with using_attention(network, TREE_ATTENTION):
            asked = [Asked(s) for s in sequences]
            tree = _tried(lambda: torch.cat(tree_logprobs(network, pack(sequences), asked, form=None)))
    if isinstance(tree, Exception):
        return f"it cannot run on a prefix tree ({tree})"
    difference = float((plain - tree).abs().max())
    # A wrong mask or position is off by whole nats; rounding is not.
    tolerance = 1e-3 if network.dtype in (torch.float32, torch.float64) else 0.3
    return (
        None
        if difference <= tolerance
        else f"a prefix tree changes its log-probabilities by {difference:.2g}"
    )


def weights_identity(network: PreTrainedModel) -> str:
    """SHA-256 of what a frozen model computes: configuration and parameters in memory, adapters left out.

    The bytes are read from memory, never from a path: what is hashed is what runs.
    """
    digest = hashlib.sha256()
    config = {
        k: v
        for k, v in network.config.to_dict().items()
        if k not in _NOT_IDENTITY and not k.startswith("_attn")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_base_tensors(network)):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_tensors(network: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    # An adapted layer keeps its own weights under `base_layer` beside `lora_*`.
    return [
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if ".lora_" not in name
    ]


def numerics_identity(base: BaseModel) -> str:
    """What else decides the last bits: dtype, device type, attention path and library versions."""
    minor = [".".join(version.split(".")[:2]) for version in (torch.__version__, transformers.__version__)]
    dtype = str(base.network.dtype).removeprefix("torch.")
    head = "fused-head" if base.head else "own-head"
    ours = f"engine-{NUMERICS_VERSION}"
    return (
        f"{dtype} {base.network.device.type} {base.attention} {head} {ours} "
        f"torch-{minor[0]} transformers-{minor[1]}"
    )
