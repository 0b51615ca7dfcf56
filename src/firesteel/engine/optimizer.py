"""AdamW with decoupled weight decay, all of whose settings arrive with each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from firesteel.sdk.errors import OperationError
from firesteel.sdk.types import AdamParams


class Optimizer:
    """torch's AdamW over a policy's trained parameters; never rescales a gradient unless asked to clip it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._adamw = torch.optim.AdamW(self._parameters, fused=True)

    def step(self, params: AdamParams) -> dict[str, float]:
        """Apply the gradient and clear it; returns `grad_norm`, the global norm before clipping.

        Raises `OperationError` without touching a weight if there is no gradient, or if it is not finite
        (it is cleared then).
        """
        if all(p.grad is None for p in self._parameters):
            raise OperationError("optim_step: there is no gradient; call forward_backward first")
        norm = float(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if not norm < float("inf"):
            self.clear()
            raise OperationError(
                f"optim_step: the gradient norm is {norm}; the weights were left as they are"
            )
        if 0 < params.grad_clip_norm < norm:
            nn.utils.clip_grads_with_norm_(self._parameters, params.grad_clip_norm, torch.tensor(norm))
        for group in self._adamw.param_groups:
            group["lr"] = params.learning_rate
            group["betas"] = (params.beta1, params.beta2)
            group["eps"] = params.eps
            group["weight_decay"] = params.weight_decay
        self._adamw.step()
        self.clear()
        return {"grad_norm": norm}

    def clear(self) -> None:
        """Drop the gradient."""
        self._adamw.zero_grad(set_to_none=True)
