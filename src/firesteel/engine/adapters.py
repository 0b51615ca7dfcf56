"""LoRA adapters on a base model, through peft. The only room that knows peft.

Layers are injected into the base network itself; several adapters can live on one base, of which at most
one is active. With none active a layer computes exactly its base layer: the base model, to the bit.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from firesteel.engine.head import Head, HeadForm
from firesteel.engine.low_rank import LowRank, adapted_linear
from firesteel.sdk.errors import ModelError
from firesteel.sdk.types import LoraConfig

if TYPE_CHECKING:
    from firesteel.engine.models import BaseModel


# Of the size of peft's A for a layer of some thousand inputs: both halves then have gradients of one size.
EXERCISE = 0.02


class AdaptedLinear(PeftLinear):  # type: ignore[misc]
    """peft's layer in all but its forward, which takes three passes over the layer's output more than it needs."""

    one_operation = True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., I]`` → ``[..., O]``."""
        layer = self.get_base_layer()
        # A subclass may be stored or computed otherwise (quantised): only peft knows how.
        if not self.one_operation or self.disable_adapters or type(layer) is not nn.Linear or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        return adapted_linear(x, layer, _active_low_rank(self))


class Adapter:
    """One LoRA adapter, named, on a base network that stays frozen."""

    def __init__(self, base: BaseModel, name: str, config: LoraConfig) -> None:
        self._base = base
        self._name = name
        _refuse_useless_rank(base, config)
        self._peft_config = PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=_target_modules(base.network, config),
        )
        self._peft_config._register_custom_module({nn.Linear: AdaptedLinear})
        # peft draws on the CPU, whatever the base is on; `torch.manual_seed` would reseed the user's GPUs, too.
        with torch.random.fork_rng(devices=[]), _expecting_several_adapters():
            torch.default_generator.manual_seed(config.seed)
            inject_adapter_in_model(self._peft_config, base.network, adapter_name=name)
        if base.network.dtype is torch.bfloat16:
            for parameter in self.parameters().values():
                parameter.data = parameter.data.float()  # in bfloat16 its steps would be rounded away
        base.network.eval()
        switch_adapter(base.network, None)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own weights, by names that do not hold the adapter's."""
        return {name.replace(f".{self._name}.", "."): p for name, p in self._own_parameters().items()}

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the network, which hold several adapters."""
        marker = f".{self._name}."
        return {
            name: p
            for name, p in self._base.network.named_parameters()
            if ".lora_" in name and marker in name
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the base with this adapter on; afterwards it is off again."""
        switch_adapter(self._base.network, self._name)
        try:
            yield
        finally:
            switch_adapter(self._base.network, None)

    @contextmanager
    def exercised(self) -> Iterator[None]:
        """Small seeded numbers in place of a B that is zero, as it is before the first step; afterwards zero again.

        With B = 0 the adapter adds nothing and A has no gradient: errors in either would not show.
        """
        generator = torch.Generator().manual_seed(0)
        fresh = [p for name, p in self.parameters().items() if ".lora_B." in name and not p.any()]
        with torch.no_grad():
            for parameter in fresh:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * EXERCISE)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter in fresh:
                    parameter.zero_()

    def write(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as `peft` reads them."""
        state = get_peft_model_state_dict(
            self._base.network,
            state_dict={name: p.detach() for name, p in self._own_parameters().items()},
            adapter_name=self._name,
            save_embedding_layers=False,
        )
        tensors = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self._peft_config.base_model_name_or_path = self._base.origin
        self._peft_config.inference_mode = True
        self._peft_config.save_pretrained(str(folder))

    def identity(self) -> str:
        """SHA-256 of base and adapter as they are in memory."""
        digest = hashlib.sha256(f"{self._base.identity} {self._peft_config.lora_alpha} ".encode())
        for name, parameter in sorted(self.parameters().items()):
            plain = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} ".encode())
            digest.update(plain.numpy().data)
        return digest.hexdigest()

    def merged(self) -> dict[str, torch.Tensor]:
        """The base's tensors by their own names, ``W + scaling · B A`` where a layer is adapted.

        Raises `ModelError` where that is no model of the base's architecture: a head that is tied to the embedding.
        """
        network = self._base.network
        tensors = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in network.state_dict().items()
            if ".lora_" not in name
        }
        for path, layer in network.named_modules():
            if not isinstance(layer, LoraLayer) or self._name not in layer.r:
                continue
            name = f"{path}.weight"
            if layer is network.get_output_embeddings() and network.config.tie_word_embeddings:
                raise ModelError(
                    f"{self._base.name}: its head is the embedding's matrix, and merging would change both; export "
                    "the adapter by itself (format peft)"
                )
            with torch.no_grad():
                change = layer.get_delta_weight(self._name)
                tensors[name] = (tensors[name].to(change.dtype) + change).to(tensors[name].dtype)
        return tensors

    def remove(self) -> None:
        """Take the adapter off the base and free its weights."""
        with _expecting_several_adapters():
            for layer in _adapted_layers(self._base.network):
                if self._name in layer.r:
                    layer.delete_adapter(self._name)
        self._base.network.peft_config.pop(self._name, None)


@contextmanager
def _expecting_several_adapters() -> Iterator[None]:
    """peft warns of what is meant here: a second adapter on a base, and the end of the active one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield


@contextmanager
def peft_layers(network: PreTrainedModel) -> Iterator[None]:
    """Let peft compute its layers itself for a while: the plain twin of `AdaptedLinear`."""
    ours = [layer for layer in _adapted_layers(network) if isinstance(layer, AdaptedLinear)]
    for layer in ours:
        layer.one_operation = False
    try:
        yield
    finally:
        for layer in ours:
            layer.one_operation = True


def switch_adapter(network: PreTrainedModel, name: str | None) -> None:
    """Activate one adapter of a base, or none."""
    for layer in _adapted_layers(network):
        if name is None or name not in layer.r:
            layer.enable_adapters(False)
        else:
            layer.enable_adapters(True)
            layer.set_adapter([name])


def output_head(network: PreTrainedModel, form: HeadForm) -> Head:
    """The head as it computes now: its own weights and, if one is active, the adapter's."""
    layer = network.get_output_embeddings()
    if not isinstance(layer, LoraLayer):
        return Head(layer.weight, layer.bias, form=form)
    plain = layer.get_base_layer()
    if layer.disable_adapters:
        return Head(plain.weight, plain.bias, form=form)
    return Head(plain.weight, plain.bias, _active_low_rank(layer), form)


def _active_low_rank(layer: LoraLayer) -> LowRank:
    (name,) = layer.active_adapters
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _adapted_layers(network: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in network.modules() if isinstance(module, LoraLayer))


def _target_modules(network: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names of the layers to adapt: last parts (`q_proj`) where these are unambiguous, else whole paths."""
    head = network.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, LoraLayer) else head
    chosen: set[str] = set()
    others: set[str] = set()
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        elif name.endswith(".base_layer") or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            (chosen if _is_chosen(name, module is head or name == "lm_head", config) else others).add(name)
    if not chosen:
        raise ModelError("the LoRA settings choose no linear layer of this model; nothing would be trained")
    last_parts = {name.rsplit(".", 1)[-1] for name in chosen}
    unambiguous = last_parts.isdisjoint(name.rsplit(".", 1)[-1] for name in others)
    return sorted(last_parts if unambiguous else chosen)


def _refuse_useless_rank(base: BaseModel, config: LoraConfig) -> None:
    """B A of a higher rank than the largest matrix has reaches nothing more, and takes memory without end."""
    shapes = (m.weight.shape for m in base.network.modules() if isinstance(m, (nn.Linear, Conv1D)))
    largest = max((min(shape) for shape in shapes if len(shape) == 2), default=0)
    if config.rank > largest:
        raise ModelError(
            f"lora_rank: {config.rank} is more than any linear layer of {base.name} has; at most {largest}, or "
            "0 to train all weights"
        )


def _is_chosen(name: str, is_head: bool, config: LoraConfig) -> bool:
    if is_head:
        return config.train_unembed
    return config.train_attn if "attn" in name or "attention" in name else config.train_mlp
