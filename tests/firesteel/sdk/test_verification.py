"""`verify` finds the fast path right where it is, and wrong wherever it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ARCHITECTURES, make_pairs
from firesteel.engine import attention, head, low_rank, packing
from firesteel.engine.plain import sketch
from firesteel.sdk import AdamParams, Datum, OperationError, TrainingClient, VerificationFailed
from firesteel.sdk.types import GradientSketch
from firesteel.sdk.verification import FLOOR, Difference, ExaminedPath, Verification, compare
from training.utils import build_service_client


def preference_loss(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """DPO's shape without a reference: its slopes depend on the log-probabilities."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    sums = torch.stack([(p * w).sum() for p, w in zip(logprobs, weights, strict=True)])
    return torch.nn.functional.softplus(-(sums[0::2] - sums[1::2]) / 8).mean(), {}


@pytest.fixture(params=[4, 0], ids=["lora", "full"])
def policy(llama_folder: str, request: pytest.FixtureRequest) -> Iterator[TrainingClient]:
    with build_service_client(base_model=llama_folder, lora_rank=request.param) as service:
        client = service.create_training_client()
        # A step first: a fresh adapter's B is zero, and with it half of the gradient.
        client.forward_backward(make_pairs(np.random.default_rng(9), 2))
        client.optim_step(AdamParams(learning_rate=0.02))
        yield client


@pytest.fixture
def data(rng: np.random.Generator) -> list[Datum]:
    return make_pairs(rng, 4)


@pytest.mark.parametrize("weighted_only", [False, True], ids=["all targets", "weighted targets"])
def test_the_fast_path_agrees(policy: TrainingClient, data: list[Datum], weighted_only: bool) -> None:
    verification = policy.verify(data, preference_loss, weighted_only=weighted_only)
    assert all(difference.agrees for difference in verification.differences)
    verification.refuse_disagreement()
    assert len(verification.lines) == 4
    for difference in verification.differences:
        assert 0 <= difference.found <= difference.allowed
        assert difference.allowed < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees(model_folders: dict[str, Path], name: str, data: list[Datum]) -> None:
    with build_service_client(base_model=str(model_folders[name]), lora_rank=0) as service:
        service.create_training_client().verify(data, preference_loss).refuse_disagreement()


def changed(module: Any, name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault: what a function of the fast path returns is changed."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        right = getattr(module, name)
        patch.setattr(module, name, lambda *args, **named: change(right(*args, **named)))

    return break_it


def positions_that_go_on_over_branches(patch: pytest.MonkeyPatch) -> None:
    right = packing.pack

    def wrong(sequences: Any) -> packing.Tree:
        tree = right(sequences)
        return packing.Tree(tree.tokens, np.arange(len(tree.tokens)), tree.segments, tree.rows)

    patch.setattr(packing, "pack", wrong)


def a_gradient_of_the_adapter_that_is_one_percent_off(patch: pytest.MonkeyPatch) -> None:
    right = low_rank._AdaptedLinear.backward

    def wrong(context: Any, gradient: torch.Tensor) -> Any:
        d_x, *none, d_down, d_up, last = right(context, gradient)
        return d_x, *none, d_down * 1.01, d_up, last

    patch.setattr(low_rank._AdaptedLinear, "backward", staticmethod(wrong))


FAULTS = {
    "attention": changed(attention, "_by_segments", lambda output: output * 1.001),
    "positions": positions_that_go_on_over_branches,
    "log-probabilities": changed(head._TargetLogprobs, "apply", lambda scores: scores + 1e-4),
    "gradient of the adapter": a_gradient_of_the_adapter_that_is_one_percent_off,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_fast_path_is_found(
    llama_folder: str, data: list[Datum], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_service_client(base_model=llama_folder, lora_rank=4) as service:
        client = service.create_training_client()
        FAULTS[fault](monkeypatch)  # on an adapter that is still zero, as before a run's first step
        verification = client.verify(data, preference_loss)
        wrong = {d.what.split(",")[0] for d in verification.differences if not d.agrees}
        with pytest.raises(VerificationFailed, match="Do not train with it"):
            verification.refuse_disagreement()
    if fault == "gradient of the adapter":
        assert wrong <= {"gradient norm", "gradient"}
    else:
        assert "log-probability" in wrong


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_nothing_is_changed_by_it(llama_folder: str, data: list[Datum], rank: int) -> None:
    outcomes = []
    for verify in (False, True):
        with build_service_client(base_model=llama_folder, lora_rank=rank) as service:
            client = service.create_training_client()
            if verify:
                client.verify(data, preference_loss)
            losses = []
            for _ in range(2):
                losses.append(client.forward_backward_custom(data, preference_loss).metrics["loss:sum"])
                losses.append(client.optim_step(AdamParams(learning_rate=0.01)).metrics["grad_norm"])
            outcomes.append(losses)
    assert outcomes[0] == outcomes[1]


def test_it_is_refused_while_a_gradient_waits_for_its_step(policy: TrainingClient, data: list[Datum]) -> None:
    policy.forward_backward(data).result()
    with pytest.raises(OperationError, match="a gradient has been added and would be lost"):
        policy.verify(data, preference_loss)
    assert policy.optim_step(AdamParams(learning_rate=0.01)).metrics["grad_norm"] > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1))
def test_a_sketch_keeps_distances(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((300, 70), (5000,), (1,))]
    gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    moves = [size * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def sketched(values: list[torch.Tensor]) -> GradientSketch:
        doubles = [torch.nn.Parameter(p.detach().double()) for p in parameters]
        for parameter, value in zip(doubles, values, strict=True):
            parameter.grad = value
        return sketch(doubles)

    one, other = sketched(gradients), sketched([g + m for g, m in zip(gradients, moves, strict=True)])
    true_norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    true_distance = sum(float(m.square().sum()) for m in moves) ** 0.5
    assert one.norm == pytest.approx(true_norm, rel=1e-12)
    assert one.distance(other) == pytest.approx(true_distance, rel=0.15)
    assert one.distance(one) == 0


def path(logprob: float, loss: float, norm: float) -> ExaminedPath:
    one = np.array([logprob], np.float32)
    return ExaminedPath((one,), loss, (np.ones(1, np.float32),), GradientSketch(norm, np.array([norm])))


def test_twice_what_two_plain_attentions_differ_by_is_allowed_and_no_less_than_the_floor() -> None:
    apart = {"eager": path(-1.0, 1.0, 1.0), "sdpa": path(-1.0001, 1.0, 1.0002)}
    logprob, _, norm, gradient = compare({"fast": path(-1.0, 1.0, 1.0), **apart}, "float32").differences
    assert logprob.allowed == pytest.approx(0.0002, rel=1e-3)
    assert gradient.allowed == norm.allowed == pytest.approx(0.0004)
    equal = {"eager": path(-1.0, 1.0, 1.0), "sdpa": path(-1.0, 1.0, 1.0)}
    for dtype, floor in FLOOR.items():
        assert compare({"fast": path(-1.0, 1.0, 1.0), **equal}, dtype).differences[0].allowed == floor


def test_plain_attentions_that_are_far_apart_vouch_for_nothing() -> None:
    apart = {"eager": path(-1.0, 1.0, 1.0), "sdpa": path(-2.0, 1.0, 2.0)}
    logprob, *_, gradient = compare({"fast": path(-1.5, 1.0, 1.5), **apart}, "float32").differences
    assert logprob.allowed == gradient.allowed == pytest.approx(1e-3)
    assert not logprob.agrees


def test_a_nan_in_any_datum_is_seen() -> None:
    good, bad = np.zeros(2, np.float32), np.array([0, np.nan], np.float32)
    sketched = GradientSketch(1.0, np.ones(1))
    plain = ExaminedPath((good, good), 1.0, (good, good), sketched)
    fast = ExaminedPath((good, bad), 1.0, (good, good), sketched)
    verification = compare({"fast": fast, "eager": plain, "sdpa": plain}, "float32")
    assert not verification.differences[0].agrees


def test_what_is_no_number_does_not_agree() -> None:
    verification = Verification((Difference("loss", float("nan"), 1.0),))
    assert verification.lines[0].endswith("DIFFERS")
    with pytest.raises(VerificationFailed, match="loss: nan"):
        verification.refuse_disagreement()
