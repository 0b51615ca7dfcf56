"""AdamW with decoupled weight decay, all of whose settings arrive with each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from firesteel.sdk.errors import CheckpointError, NonFiniteError, OperationError
from firesteel.sdk.types import AdamParams

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """torch's AdamW over a policy's trained parameters; never rescales a gradient unless asked to clip it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """`parameters` by name, at least one. The names are those of a saved state."""
        self._named = dict(parameters)
        self._parameters = list(self._named.values())
        self._adamw = torch.optim.AdamW(self._parameters, fused=True)

    def step(self, params: AdamParams) -> dict[str, float]:
        """Apply the gradient and clear it; returns `grad_norm`, the global norm before clipping.

        Raises `OperationError` without touching a weight if there is no gradient, `NonFiniteError` if it is not
        finite (it is cleared then).
        """
        if not self.has_gradient:
            raise OperationError("optim_step: there is no gradient; call forward_backward first")
        norm = float(nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        if not norm < float("inf"):
            self.clear()
            raise NonFiniteError(
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

    @property
    def has_gradient(self) -> bool:
        """Whether some was added since the last step."""
        return any(parameter.grad is not None for parameter in self._parameters)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all moments and counts as `<name>.<moment>`; a parameter that never had a gradient has none."""
        return {
            f"{name}.{moment}": value.detach().to("cpu", copy=True)
            for name, parameter in self._named.items()
            for moment, value in self._adamw.state.get(parameter, {}).items()
        }

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise `CheckpointError` unless a state is of these parameters."""
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            parameter = self._named.get(name)
            if parameter is None or moment not in MOMENTS:
                raise CheckpointError(f"the optimizer's state has {key}, which this model does not train")
            if moment != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimizer's state has {key} of shape {tuple(value.shape)}, this model's is "
                    f"{tuple(parameter.shape)}"
                )

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state that `check` has passed; an empty one starts anew."""
        self.clear()
        self._adamw.state.clear()
        for key, value in state.items():
            name, _, moment = key.rpartition(".")
            parameter = self._named[name]
            self._adamw.state[parameter][moment] = value.to(parameter.device).clone()

    def clear(self) -> None:
        """Drop the gradient."""
        self._adamw.zero_grad(set_to_none=True)
