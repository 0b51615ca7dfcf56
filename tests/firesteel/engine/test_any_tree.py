"""Any set of sequences, cut and shared in any way, gives the log-probabilities and the gradient of the plain path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trainers import clear, full_trainer, gradients, relative_difference
from transformers import PreTrainedModel

from firesteel.engine.logprobs import Asked
from firesteel.engine.packing import plan
from firesteel.engine.trainer import Sequences, Trainer
from firesteel.sdk import Datum, ModelInput
from plain import load_plain, norms_in_own_dtype, plain_logprobs

# Few different tokens and short sequences: shared prefixes, prefixes of each other and twins are the rule.
sequence = st.lists(st.integers(2, 4), min_size=2, max_size=9)
batch = st.lists(sequence, min_size=1, max_size=7)
BUDGETS = (1, 7, 10_000)


@dataclass(frozen=True)
class Twins:
    """The fast path and the plain one on the same weights, in float64; tied head and embedding."""

    fast: Trainer
    plain: PreTrainedModel


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def twins(model_folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Twins]:
    folder = model_folders[request.param]
    with norms_in_own_dtype():
        yield Twins(full_trainer(folder, "float64"), load_plain(folder, torch.float64))


def datum(tokens: list[int], slopes: np.ndarray) -> Datum:
    return Datum(
        ModelInput.from_ints(tokens[:-1]), {"target_tokens": np.asarray(tokens[1:]), "weights": slopes}
    )


def with_corners(test):  # type: ignore[no-untyped-def]
    corners = [
        [[2, 3]],  # one alone
        [[2, 3], [2, 3]],  # twins
        [[2, 3, 4], [3, 4, 2]],  # nothing shared
        [[2, 3, 4], [2, 3, 4, 2, 3]],  # one side a prefix of the other
        [[2, 2, 2, 2, 2], [2, 2, 2, 2, 3], [2, 2, 2, 3], [2, 2, 3], [2, 3], [3, 3]],  # depth 5
        [[2, 3, 4, 2], [3, 3], [2, 3, 4, 3], [3, 3, 2], [2, 3, 4, 2]],  # shared by rows that lie apart
    ]
    for corner in corners:
        test = example(corner, 0, 7)(test)
    return settings(max_examples=40, deadline=None)(
        given(batch, st.integers(0, 99), st.sampled_from(BUDGETS))(test)
    )


@with_corners
def test_any_batch_gives_the_plain_paths_numbers(
    twins: Twins, batch: list[list[int]], seed: int, budget: int
) -> None:
    rng = np.random.default_rng(seed)
    # Some targets are not asked for, as in a prompt; of a shared position one sequence may ask and another not.
    slopes = [rng.normal(size=len(s) - 1).astype(np.float32) * (rng.random(len(s) - 1) < 0.7) for s in batch]
    data = [datum(tokens, slope) for tokens, slope in zip(batch, slopes, strict=True)]
    tokens = tuple(np.asarray(s[:-1], np.int64) for s in batch)
    asked = tuple(
        Asked(np.asarray(s[1:], np.int64), slope != 0) for s, slope in zip(batch, slopes, strict=True)
    )

    clear(twins.fast)
    scores = twins.fast.forward_backward(
        Sequences(tokens, asked, plan(tokens, budget)),
        lambda index, logprobs: (logprobs * torch.from_numpy(slopes[index])).sum(),
    )
    twins.plain.zero_grad()
    for one, slope, found in zip(data, slopes, scores.logprobs, strict=True):
        expected = plain_logprobs(twins.plain, one)
        np.testing.assert_allclose(
            found, np.where(slope != 0, expected.detach().numpy(), 0), rtol=0, atol=1e-10
        )
        (expected * torch.from_numpy(slope)).sum().backward()
    if not any(slope.any() for slope in slopes):
        assert gradients(twins.fast) == {}
        return
    plain = {name: p.grad for name, p in twins.plain.named_parameters() if p.grad is not None}
    assert relative_difference(plain, gradients(twins.fast)) <= 1e-10


@settings(max_examples=15, deadline=None)
@given(batch, st.integers(0, 99), st.sampled_from(BUDGETS))
def test_the_order_of_the_rows_and_their_number_of_calls_change_nothing(
    twins: Twins, batch: list[list[int]], seed: int, budget: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(batch))

    def added(rows: list[list[list[int]]]) -> dict[str, torch.Tensor]:
        clear(twins.fast)
        for call in rows:
            tokens = tuple(np.asarray(s[:-1], np.int64) for s in call)
            asked = tuple(Asked(np.asarray(s[1:], np.int64)) for s in call)
            sequences = Sequences(tokens, asked, plan(tokens, budget))
            twins.fast.forward_backward(sequences, lambda index, logprobs: -logprobs.sum())
        return gradients(twins.fast)

    together, apart = added([[batch[i] for i in order]]), added([[row] for row in batch])
    assert relative_difference(together, apart) <= 1e-10
