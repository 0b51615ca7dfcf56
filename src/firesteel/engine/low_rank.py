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
    """``[..., I]`` → ``[..., O]`` in x's dtype.

    An adapter of a wider dtype is rounded to x's for the products, as under autocast; its gradient is not.
    """
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
        narrow_down, narrow_up = down.to(x.dtype), up.to(x.dtype)
        t = F.linear(x, narrow_down).mul_(scaling)
        ctx.save_for_backward(x, weight, narrow_down, narrow_up, t)
        ctx.scaling, ctx.wide = scaling, down.dtype
        return F.linear(x, weight, bias).addmm_(t, narrow_up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight, down, up, t = ctx.saved_tensors
        u = torch.mm(gradient, up).mul_(ctx.scaling)
        d_x = torch.mm(gradient, weight).addmm_(u, down) if ctx.needs_input_grad[0] else None
        d_down, d_up = _product(u.t(), x, ctx.wide), _product(gradient.t(), t, ctx.wide)
        return d_x, None, None, d_down, d_up, None


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a b`` in a dtype that may be wider than theirs: what is summed over all tokens is not rounded to theirs."""
    if a.dtype is dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))
