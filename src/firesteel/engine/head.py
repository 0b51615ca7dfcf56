"""Hidden states and output head → log-probabilities of targets, tile by tile, keeping no logits.

For a row h, with a = h Wᵀ + b, z = scale · a or cap · tanh(scale · a / cap), p = softmax(z), and the targets t_k
that are asked for at this row:

    s_k = z[t_k] - logsumexp(z)
    ∂(Σ g_k s_k) / ∂z = Σ g_k e(t_k) - (Σ g_k) p

The second term depends on g by one number per row. So under a **frozen** head the forward keeps ``q = p W``, a
row of hidden size, beside the scores, and the backward is a gather: ``Σ g_k W[t_k] - (Σ g_k) q``. Two matrix
multiplications by W in all: no fewer are possible. A **trained** head needs p again for its own gradient, and p
is the size that must not be kept, so the backward computes it anew.

Logits are computed in tiles of some rows by some columns and added up as in a running softmax (Milakov and
Gimelshein, arXiv 1805.02867): a tile that stays in the processor's cache costs little more than its product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from firesteel.engine.low_rank import LowRank
from firesteel.sdk.types import IntArray


@dataclass(frozen=True)
class HeadForm:
    """What an architecture does to the output of its head."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """Head's output → logits, in place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, z: torch.Tensor) -> torch.Tensor | None:
        """The derivative of `apply`, from the logits: ``scale · (1 - (z/cap)²)``; None where it is 1."""
        if self.softcap is None:
            return None if self.scale == 1.0 else z.new_tensor(self.scale)
        return (z / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """An output head as it is now: `weight` ``[V, H]``, `bias` ``[V]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    low_rank: LowRank | None = None
    form: HeadForm = HeadForm()


@dataclass(frozen=True)
class Targets:
    """Which entries of the logits are asked for: `ids[k]` at row `rows[k]`."""

    rows: IntArray
    ids: IntArray


@dataclass(frozen=True)
class TileSize:
    """How much of the logits is computed at once."""

    rows: int
    columns: int


# Measured: benchmarks/RESULTS.md. A GPU wants large products more than a small working set.
TILE = {"cpu": TileSize(1024, 2048), "cuda": TileSize(4096, 16384)}


def target_logprobs(
    head: Head, hidden: torch.Tensor, targets: Targets, tile: TileSize | None = None
) -> torch.Tensor:
    """Log-probabilities ``[K]`` of targets, from the states ``[N, H]`` that the head reads.

    Nothing of size rows times vocabulary is made. Reductions are float32, or float64 in a float64 model.
    """
    low, up = None, None
    if head.low_rank is not None:
        down, up = head.low_rank.down, head.low_rank.up
        low = F.linear(hidden.to(down.dtype), down) * head.low_rank.scaling
    call = _Call(head.form, targets, tile or TILE[hidden.device.type])
    scores: torch.Tensor = _TargetLogprobs.apply(hidden, head.weight, head.bias, low, up, call)  # type: ignore[no-untyped-call]
    return scores


def head_form(config: PretrainedConfig) -> HeadForm:
    """What a configuration says of its head's form. Whether that is all there is, only a trial shows."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    return HeadForm(scale, getattr(text, "final_logit_softcapping", None))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of reductions in a model of this type."""
    return dtype if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class _Tile:
    """Some columns of some rows of the logits, and the targets that lie in it."""

    rows: slice
    columns: slice
    members: torch.Tensor
    """Places of these targets in the call's list."""
    entries: tuple[torch.Tensor, torch.Tensor]
    """Row and column of each, inside the tile."""


@dataclass(frozen=True)
class _Call:
    """What is no tensor."""

    form: HeadForm
    targets: Targets
    size: TileSize

    def tiles(self, hidden: torch.Tensor, vocabulary: int) -> Iterator[list[_Tile]]:
        """For each run of rows, its tiles from the first column to the last."""
        rows, ids, size = self.targets.rows, self.targets.ids, self.size
        across = -(-vocabulary // size.columns)
        tile_of = rows // size.rows * across + ids // size.columns
        order = np.argsort(tile_of, kind="stable")
        down = -(-len(hidden) // size.rows)
        members_of = np.split(order, np.searchsorted(tile_of[order], np.arange(1, down * across)))
        for top in range(0, len(hidden), size.rows):
            run = slice(top, min(top + size.rows, len(hidden)))
            tiles = []
            for left in range(0, vocabulary, size.columns):
                members = members_of[top // size.rows * across + left // size.columns]
                parts = (members, rows[members] - top, ids[members] - left)
                places, row, column = (torch.from_numpy(part).to(hidden.device) for part in parts)
                columns = slice(left, min(left + size.columns, vocabulary))
                tiles.append(_Tile(run, columns, places, (row, column)))
            yield tiles

    def row_of(self, device: torch.device) -> torch.Tensor:
        """The row of each target."""
        return torch.from_numpy(self.targets.rows).to(device)


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call, those that a gradient may be asked for, in the order of `apply`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    low: torch.Tensor | None
    up: torch.Tensor | None

    def buffer(self, size: TileSize) -> torch.Tensor:
        """Room for one tile. One for all: fresh pages would cost as much as the softmax."""
        return self.hidden.new_empty(min(size.rows, len(self.hidden)) * min(size.columns, len(self.weight)))

    def logits(self, tile: _Tile, form: HeadForm, buffer: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]``, wide enough for reductions; it lies in the buffer: the next overwrites it."""
        rows, columns = self.hidden[tile.rows], self.weight[tile.columns]
        z = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
        torch.mm(rows, columns.t(), out=z)
        if self.bias is not None:
            z += self.bias[tile.columns]
        if self.low is not None and self.up is not None:
            z += torch.mm(self.low[tile.rows], self.up[tile.columns].t())
        return form.apply(z.to(wide(z.dtype)))


class _RunningSoftmax:
    """Of some rows: the largest logit so far, the sum of exponentials relative to it, and that of ``p W``."""

    def __init__(self, hidden: torch.Tensor, with_expected: bool) -> None:
        self._largest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide(hidden.dtype))
        self._sum = torch.zeros_like(self._largest)
        self._expected = torch.zeros_like(hidden, dtype=wide(hidden.dtype)) if with_expected else None

    def add(self, z: torch.Tensor, slope: torch.Tensor | None, weight: torch.Tensor) -> None:
        """Some columns more; `z` is overwritten."""
        largest = torch.maximum(self._largest, z.amax(dim=1, keepdim=True))
        shrink = (self._largest - largest).exp_()
        z.sub_(largest).exp_()
        self._sum.mul_(shrink).add_(z.sum(dim=1, keepdim=True))
        if self._expected is not None:
            _add_product(self._expected.mul_(shrink), z if slope is None else z.mul_(slope), weight)
        self._largest = largest

    @property
    def normalizer(self) -> torch.Tensor:
        """``logsumexp`` of each row."""
        return (self._largest + self._sum.log())[:, 0]

    @property
    def expected(self) -> torch.Tensor:
        """``Σ p slope W`` of each row, where it was asked for."""
        assert self._expected is not None
        return self._expected / self._sum


class _TargetLogprobs(torch.autograd.Function):
    """See the module's text."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *tensors, call = arguments
        inputs = _Inputs(*tensors)
        hidden = inputs.hidden
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:])
        scores = hidden.new_empty(len(call.targets.ids), dtype=wide(hidden.dtype))
        slopes = torch.ones_like(scores) if frozen else None
        buffer = inputs.buffer(call.size)
        runs: list[_RunningSoftmax] = []
        for tiles in call.tiles(hidden, len(inputs.weight)):
            softmax = _RunningSoftmax(hidden[tiles[0].rows], frozen)
            for tile in tiles:
                z = inputs.logits(tile, call.form, buffer)
                slope = call.form.slope(z)
                scores[tile.members] = z[tile.entries]
                if slopes is not None and slope is not None:
                    slopes[tile.members] = slope.expand_as(z)[tile.entries]
                softmax.add(z, slope, inputs.weight[tile.columns])
            runs.append(softmax)
        normalizer = torch.cat([run.normalizer for run in runs])
        expected = torch.cat([run.expected for run in runs]) if frozen else None
        ctx.call = call
        ctx.save_for_backward(*tensors, normalizer, expected, slopes)
        return scores - normalizer[call.row_of(hidden.device)]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        *tensors, normalizer, expected, slopes = ctx.saved_tensors
        inputs, (gradient,) = _Inputs(*tensors), gradients
        row_of = ctx.call.row_of(gradient.device)
        total = gradient.new_zeros(len(normalizer))
        _add_at(total, row_of, gradient)
        if expected is None:
            return (*_recomputed(ctx, inputs, normalizer, gradient, total), None)
        ids = torch.from_numpy(ctx.call.targets.ids).to(gradient.device)
        d_hidden = expected * -total[:, None]
        pulls = inputs.weight[ids].to(gradient.dtype).mul_((gradient * slopes)[:, None])
        _add_at(d_hidden, row_of, pulls)
        return (d_hidden.to(inputs.hidden.dtype), *[None] * 5)


def _recomputed(
    ctx: Any, inputs: _Inputs, normalizer: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of all inputs, the probabilities computed anew tile by tile."""
    call, hidden, weight, low, up = ctx.call, inputs.hidden, inputs.weight, inputs.low, inputs.up
    given = (hidden, weight, inputs.bias, low, up)
    sums = [
        _Sum(tensor, wide(hidden.dtype)) if tensor is not None and wanted else None
        for tensor, wanted in zip(given, ctx.needs_input_grad, strict=False)
    ]
    d_hidden, d_weight, d_bias, d_low, d_up = sums
    buffer = inputs.buffer(call.size)
    for tile in itertools.chain.from_iterable(call.tiles(hidden, len(weight))):
        z = inputs.logits(tile, call.form, buffer)
        slope = call.form.slope(z)
        dz = z.sub_(normalizer[tile.rows, None]).exp_().mul_(-total[tile.rows, None])
        rows, columns = tile.entries
        _add_at(dz.view(-1), rows * dz.shape[1] + columns, gradient[tile.members])
        dz = dz if slope is None else dz.mul_(slope)
        first_column, first_row = tile.columns.start == 0, tile.rows.start == 0
        if d_hidden is not None:
            d_hidden.add_product(tile.rows, dz, weight[tile.columns], fresh=first_column)
        if d_weight is not None:
            d_weight.add_product(tile.columns, dz.t(), hidden[tile.rows], fresh=first_row)
        if d_bias is not None:
            d_bias.add(tile.columns, dz.sum(0), fresh=first_row)
        if d_low is not None and up is not None:
            d_low.add_product(tile.rows, dz, up[tile.columns], fresh=first_column)
        if d_up is not None and low is not None:
            d_up.add_product(tile.columns, dz.t(), low[tile.rows], fresh=first_row)
    return [None if total is None else total.result for total in sums]


class _Sum:
    """A gradient added up over tiles in a type wide enough; what comes first is written, not added to zeros.

    The head's gradient is as large as the vocabulary: filling it and reading the zeros back would cost as much as
    a product with few rows.
    """

    def __init__(self, like: torch.Tensor, dtype: torch.dtype) -> None:
        self._dtype = like.dtype
        self._total = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    @property
    def result(self) -> torch.Tensor:
        """The sum, in its tensor's own type."""
        return self._total.to(self._dtype)

    def add_product(self, part: slice, a: torch.Tensor, b: torch.Tensor, *, fresh: bool) -> None:
        """``total[part] += a b``, `fresh` where nothing was added there before."""
        total = self._total[part]
        if total.dtype is not b.dtype:
            self.add(part, torch.mm(a.to(b.dtype), b), fresh=fresh)
        elif fresh:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)

    def add(self, part: slice, value: torch.Tensor, *, fresh: bool) -> None:
        """``total[part] += value``."""
        if fresh:
            self._total[part] = value
        else:
            self._total[part] += value


def _add_at(total: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """``total[index] += values``, the same bits every time: several values may go to one place.

    On a GPU `index_add_` adds them in any order, on a CPU with several threads `index_put_` does.
    """
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a b`` in b's type where that is narrower: the sum over tiles stays wide."""
    if total.dtype is b.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a.to(b.dtype), b)
