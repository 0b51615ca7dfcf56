"""A frozen linear layer with a low-rank adapter beside it, as one operation.

With the frozen W, adapter halves A (down, ``[r, I]``) and B (up, ``[O, r]``) and scaling s::

    t = s x Aᵀ          y  = x Wᵀ + b + t Bᵀ
    u = s g B           dx = g W + u A           dA = uᵀ x           dB = gᵀ t        g = ∂L/∂y

The rank-r updates go straight into the large products' results, so that beside those only arrays of width r are
made; composed of separate layers (as peft does) the same costs three more passes over arrays of width O and as
much more memory for their backward. Nothing is computed for W: it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class LowRank:
    """An adapter's part of a linear layer, ``scaling · up down``: `down` ``[r, I]``, `up` ``[O, r]``."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


def adapted_linear(x: torch.Tensor, layer: nn.Linear, low_rank: LowRank) -> torch.Tensor:
    """``[..., I]`` → ``[..., O]`` in x's dtype; the adapter may have a wider one, and its sums are taken in it."""
    flat = x.reshape(-1, x.shape[-1])
    low, up = low_rank.down, low_rank.up
    y: torch.Tensor = _AdaptedLinear.apply(flat, layer.weight, layer.bias, low, up, low_rank.scaling)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


class _AdaptedLinear(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        t = F.linear(x.to(down.dtype), down).mul_(scaling)
        ctx.save_for_backward(x, weight, down, up, t)
        ctx.scaling = scaling
        return _plus_product(F.linear(x, weight, bias), t, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, down, up, t = ctx.saved_tensors
        g = gradient.to(up.dtype)
        u = torch.mm(g, up).mul_(ctx.scaling)
        d_x = _plus_product(torch.mm(gradient, weight), u, down) if ctx.needs_input_grad[0] else None
        return d_x, None, None, torch.mm(u.t(), x.to(down.dtype)), torch.mm(g.t(), t), None


def _plus_product(result: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``result + a b``, in place where the types agree, else summed in the wider one and rounded once."""
    if result.dtype is a.dtype:
        return result.addmm_(a, b)
    return (result + torch.mm(a, b)).to(result.dtype)
