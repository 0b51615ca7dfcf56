"""The adapted layer as one operation: what its composition of separate layers gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firesteel.engine.low_rank import LowRank, adapted_linear

ROWS, WIDE, NARROW, RANK, SCALING = 7, 6, 5, 3, 1.7


def layer(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDE, NARROW, bias=bias, dtype=dtype).requires_grad_(False)


def adapter(dtype: torch.dtype = torch.float64) -> LowRank:
    torch.manual_seed(1)
    down, up = torch.randn(RANK, WIDE, dtype=dtype), torch.randn(NARROW, RANK, dtype=dtype)
    return LowRank(down.requires_grad_(), up.requires_grad_(), SCALING)


def composed(x: torch.Tensor, linear: nn.Linear, low_rank: LowRank) -> torch.Tensor:
    """Layer by layer, as peft does it: the twin."""
    delta = F.linear(F.linear(x.to(low_rank.down.dtype), low_rank.down), low_rank.up) * low_rank.scaling
    return (linear(x) + delta).to(x.dtype)


@pytest.mark.parametrize("shape", [(ROWS, WIDE), (1, ROWS, WIDE), (2, 3, WIDE), (0, WIDE)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_composition_and_so_are_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [], []
    for compute in (adapted_linear, composed):
        low_rank = adapter()
        y = compute(x, layer(bias), low_rank)
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        outputs.append(y)
        gradients.append(torch.autograd.grad((y.sin() * weights).sum(), (x, low_rank.down, low_rank.up)))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_backward_is_the_derivative_of_the_forward() -> None:
    x = torch.randn(ROWS, WIDE, dtype=torch.float64, requires_grad=True)
    low_rank, linear = adapter(), layer(bias=True)
    assert torch.autograd.gradcheck(
        lambda x, down, up: adapted_linear(x, linear, LowRank(down, up, SCALING)),
        (x, low_rank.down, low_rank.up),
    )


def test_an_input_without_a_gradient_still_gives_the_adapter_one() -> None:
    x = torch.randn(ROWS, WIDE, dtype=torch.float64)
    ours, theirs = adapter(), adapter()
    adapted_linear(x, layer(True), ours).square().sum().backward()
    composed(x, layer(True), theirs).square().sum().backward()
    assert torch.allclose(ours.down.grad, theirs.down.grad, atol=1e-12)
    assert torch.allclose(ours.up.grad, theirs.up.grad, atol=1e-12)


def test_beside_a_bfloat16_layer_only_products_are_rounded_and_not_the_adapters_gradient() -> None:
    x = torch.randn(ROWS, WIDE, dtype=torch.bfloat16, requires_grad=True)
    ours = adapter(torch.float32)
    exact = LowRank(*(half.detach().double().requires_grad_() for half in (ours.down, ours.up)), SCALING)
    y = adapted_linear(x, layer(True, torch.bfloat16), ours)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    expected = composed(x.detach().double(), layer(True, torch.bfloat16).double(), exact)
    torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=2**-4)
    expected.square().sum().backward()
    for one, other in ((ours.down.grad, exact.down.grad), (ours.up.grad, exact.up.grad)):
        assert one.dtype is torch.float32
        assert not torch.equal(one, one.bfloat16().float())
        assert (one.double() - other).norm() < 2e-2 * other.norm()


def test_nothing_is_kept_for_the_backward_but_the_input_and_arrays_of_the_adapters_width() -> None:
    x = torch.randn(64, WIDE, dtype=torch.float64, requires_grad=True)
    low_rank, linear = adapter(), layer(False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted_linear(x, linear, low_rank)
    known = {t.data_ptr() for t in (x, linear.weight, low_rank.down, low_rank.up)}
    assert {tuple(t.shape) for t in saved if t.data_ptr() not in known} == {(64, RANK)}
