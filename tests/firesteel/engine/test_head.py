"""The fused head gives the log-probabilities and all gradients of full logits, and makes no full logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from firesteel.engine.head import Head, HeadForm, LowRank, Targets, TileSize, target_logprobs

ROWS, VOCABULARY, HIDDEN, RANK = 11, 37, 8, 3
TILES = {
    "one": TileSize(1, 1),
    "seven": TileSize(7, 7),
    "all": TileSize(ROWS, VOCABULARY),
    "more than all": TileSize(100, 100),
    "rows": TileSize(4, VOCABULARY),
    "columns": TileSize(ROWS, 5),
}
FORMS = {
    "plain": HeadForm(),
    "scaled": HeadForm(0.3),
    "capped": HeadForm(1.0, 2.0),
    "both": HeadForm(1.7, 3.0),
}
HEADS = {"frozen": (), "trained": ("weight",), "with a bias": ("weight", "bias"), "adapted": ("down", "up")}


@dataclass
class Case:
    """The tensors of one head, by name, and what is asked of it."""

    tensors: dict[str, torch.Tensor]
    targets: Targets
    upstream: torch.Tensor

    @classmethod
    def draw(cls, trained: tuple[str, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
        """Random states and weights; several targets on some rows, none on others, some of them twice."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        tensors = {"hidden": normal(ROWS, HIDDEN), "weight": normal(VOCABULARY, HIDDEN)}
        if "bias" in trained:
            tensors["bias"] = normal(VOCABULARY)
        if "up" in trained:
            tensors |= {"down": normal(RANK, HIDDEN), "up": normal(VOCABULARY, RANK)}
        for name in ("hidden", *trained):
            tensors[name].requires_grad_(True)
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, ROWS - 1, 16)  # never the last row
        targets = Targets(np.append(rows, rows[0]), np.append(rng.integers(0, VOCABULARY, 16), 5))
        return cls(tensors, targets, normal(17).to(torch.float64))

    def head(self, form: HeadForm) -> Head:
        """These tensors as the engine hands them over."""
        low_rank = LowRank(self.tensors["down"], self.tensors["up"], 0.7) if "down" in self.tensors else None
        return Head(self.tensors["weight"], self.tensors.get("bias"), low_rank, form)

    def gradients(self, scores: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the weighted sum of the scores, for everything that is trained."""
        wanted = {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}
        found = torch.autograd.grad((scores.double() * self.upstream).sum(), list(wanted.values()))
        return dict(zip(wanted, found, strict=True))

    def dense(self, form: HeadForm) -> torch.Tensor:
        """The same scores from full logits, written as the definition says."""
        t = self.tensors
        logits = t["hidden"] @ t["weight"].T + t.get("bias", 0.0)
        if "down" in t:
            logits = logits + 0.7 * (t["hidden"] @ t["down"].T) @ t["up"].T
        logits = logits * form.scale
        if form.softcap is not None:
            logits = form.softcap * torch.tanh(logits / form.softcap)
        return logits.log_softmax(dim=-1)[
            torch.from_numpy(self.targets.rows), torch.from_numpy(self.targets.ids)
        ]


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", HEADS)
def test_scores_and_gradients_are_those_of_full_logits(trained: str, form: str, tile: str) -> None:
    case = Case.draw(HEADS[trained])
    scores = target_logprobs(case.head(FORMS[form]), case.tensors["hidden"], case.targets, TILES[tile])
    dense = case.dense(FORMS[form])
    assert float((scores - dense).detach().abs().max()) < 1e-12
    assert largest(case.gradients(scores), case.gradients(dense)) < 1e-11


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", HEADS)
def test_the_backward_is_the_derivative_of_the_forward(trained: str, form: str) -> None:
    case = Case.draw(HEADS[trained])
    names = ["hidden", *HEADS[trained]]

    def scores(*tensors: torch.Tensor) -> torch.Tensor:
        changed = replace(case, tensors=case.tensors | dict(zip(names, tensors, strict=True)))
        head = changed.head(FORMS[form])
        return target_logprobs(head, changed.tensors["hidden"], case.targets, TileSize(4, 10))

    assert torch.autograd.gradcheck(scores, [case.tensors[name] for name in names])


@given(st.integers(1, 30), st.integers(1, 60), st.integers(0, 2**16))
@settings(max_examples=40)
def test_the_tile_changes_nothing(rows: int, columns: int, seed: int) -> None:
    case = Case.draw(("weight",), seed=seed)
    one, other = (
        target_logprobs(case.head(HeadForm()), case.tensors["hidden"], case.targets, tile)
        for tile in (TileSize(rows, columns), TILES["all"])
    )
    assert float((one - other).detach().abs().max()) < 1e-12
    assert largest(case.gradients(one), case.gradients(other)) < 1e-11


@pytest.mark.parametrize("trained", HEADS)
def test_reductions_are_float32_in_a_bfloat16_model(trained: str) -> None:
    case = Case.draw(HEADS[trained], torch.bfloat16)
    scores = target_logprobs(case.head(HeadForm()), case.tensors["hidden"], case.targets, TileSize(4, 3))
    assert scores.dtype is torch.float32
    exact = Case(
        {n: t.detach().double().requires_grad_() for n, t in case.tensors.items()},
        case.targets,
        case.upstream,
    )
    dense = exact.dense(HeadForm())
    # The logits themselves are bfloat16: around 16 they lie 1/8 apart.
    assert float((scores - dense).detach().abs().max()) < 0.1
    ours, theirs = case.gradients(scores), exact.gradients(dense)
    for name, gradient in ours.items():
        assert gradient.dtype is torch.bfloat16
        assert float((gradient.double() - theirs[name]).norm() / theirs[name].norm()) < 0.02, name


def test_logits_far_apart_do_not_overflow() -> None:
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    targets = Targets(np.array([0, 0, 1]), np.array([0, 1, 1]))
    scores = target_logprobs(Head(weight), hidden, targets, TileSize(1, 1))
    assert scores.tolist() == [0.0, -600.0, 0.0]
    scores.sum().backward()
    assert bool(hidden.grad.isfinite().all())  # type: ignore[union-attr]


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [(), ("weight",)], ids=["frozen", "trained"])
def test_nothing_of_size_positions_times_vocabulary_is_ever_made(trained: tuple[str, ...]) -> None:
    rows, vocabulary, hidden = 64, 512, 4
    weight = torch.randn(vocabulary, hidden, requires_grad=bool(trained))
    states = torch.randn(rows, hidden, requires_grad=True)
    targets = Targets(np.arange(rows), np.arange(rows))
    with LargestTensor() as made:
        target_logprobs(Head(weight), states, targets, TileSize(16, 32)).sum().backward()
    assert made.elements < rows * vocabulary / 10
    with LargestTensor() as made:
        (states @ weight.T).log_softmax(-1).sum().backward()
    assert made.elements == rows * vocabulary


@pytest.mark.parametrize("trained", [False, True])
def test_with_several_threads_the_gradient_is_the_same_to_the_bit_every_time(trained: bool) -> None:
    """At the last token of a prompt each answer has a target: their pulls meet in one row."""
    rows, answers, hidden, vocabulary = 300, 4, 576, 512
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator)
    ids = np.random.default_rng(0).integers(0, 3, rows * answers)
    targets = Targets(np.tile(np.arange(rows), answers), ids)
    slopes = torch.randn(rows * answers, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = set()
        for _ in range(40):
            leaf, own = states.clone().requires_grad_(), weight.clone().requires_grad_(trained)
            target_logprobs(Head(own), leaf, targets).backward(slopes)
            assert leaf.grad is not None
            found.add(leaf.grad.numpy().tobytes() + (own.grad.numpy().tobytes() if trained else b""))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
