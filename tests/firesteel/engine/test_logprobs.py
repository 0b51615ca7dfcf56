"""Log-probabilities over a prefix tree are those of each sequence by itself, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import load
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PhiConfig, PreTrainedModel

from conftest import ARCHITECTURES, VOCABULARY
from firesteel.engine import logprobs
from firesteel.engine.head import HeadForm, head_form
from firesteel.engine.logprobs import Asked, tree_logprobs
from firesteel.engine.packing import pack
from firesteel.sdk import Datum, ModelInput
from plain import load_plain, norms_in_own_dtype, plain_logits, plain_logprobs

PRECISIONS = {"float64": 1e-10, "float32": 1e-5}

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Whatever a head does beside a product: all of it has to count.
HEADS = {
    "logit_scale": CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=0.25),
    "logits_scaling": GraniteConfig(
        **SMALL, num_key_value_heads=2, logits_scaling=3.0, attention_multiplier=0.5, embedding_multiplier=2.0
    ),
    "bias": PhiConfig(**SMALL),
}


def datum(tokens: np.ndarray, targets: np.ndarray | None = None) -> Datum:
    """Every token of the sequence is read and scored, or `targets` at its places."""
    return Datum(
        ModelInput.from_ints(tokens), {"target_tokens": np.roll(tokens, -1) if targets is None else targets}
    )


def forest(rng: np.random.Generator) -> list[Datum]:
    """A pair, a deeper tree, a prefix of another, twins, a single token, and one that shares nothing."""

    def draw(n: int) -> np.ndarray:
        return rng.integers(2, VOCABULARY, n)

    prompt, turn, other = draw(9), draw(5), draw(1)
    chosen, rejected, deep = draw(6), draw(4), draw(3)
    parts = [
        (prompt, chosen),
        (prompt, rejected),
        (prompt, chosen[:3], turn, deep),
        (prompt, chosen[:3], turn, deep[:1], turn),
        (prompt,),
        (prompt, rejected),
        (other,),
        (draw(12),),
    ]
    return [datum(np.concatenate(part)) for part in parts]


def asked_of(d: Datum) -> Asked:
    return Asked(d.loss_fn_inputs["target_tokens"].to_numpy())


def on_a_tree(network: PreTrainedModel, data: Iterable[Datum]) -> list[torch.Tensor]:
    rows = [np.asarray(d.model_input.to_ints(), np.int64) for d in data]
    with torch.no_grad():
        return tree_logprobs(network, pack(rows), [asked_of(d) for d in data], head_form(network.config))


def by_itself(network: PreTrainedModel, data: Iterable[Datum]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [plain_logprobs(network, d) for d in data]


def largest_difference(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tree_gives_the_log_probabilities_of_the_plain_path(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, dtype: str
) -> None:
    folder, data = model_folders[name], forest(rng)
    with norms_in_own_dtype() if dtype == "float64" else nullcontext():
        base = load(folder, dtype)
        assert base.attention == "tree"
        ours = on_a_tree(base.network, data)
        plain = by_itself(load_plain(folder, getattr(torch, dtype)), data)
    assert all(values.dtype is getattr(torch, dtype) for values in ours)
    assert largest_difference(ours, plain) <= PRECISIONS[dtype]


@pytest.mark.parametrize("name", HEADS)
def test_what_a_head_does_beside_a_product_counts(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(HEADS[name])
    if name == "bias":
        torch.nn.init.normal_(network.get_output_embeddings().bias)
    network.save_pretrained(tmp_path)
    base, data = load(tmp_path), forest(rng)
    assert base.attention == "tree"
    assert base.head is not None
    assert largest_difference(on_a_tree(base.network, data), by_itself(load_plain(tmp_path), data)) <= 1e-5


def test_what_is_not_asked_for_reads_zero_and_the_rest_is_the_same(
    model_folders: dict[str, Path], rng: np.random.Generator
) -> None:
    network, data = load(model_folders["llama"]).network, forest(rng)
    rows = [np.asarray(d.model_input.to_ints()) for d in data]
    everything = on_a_tree(network, data)
    masks = [rng.random(len(row)) < 0.4 for row in rows]
    masks[0][:] = False
    asked = [Asked(asked_of(d).targets, mask) for d, mask in zip(data, masks, strict=True)]
    for form in (None, HeadForm()):
        with torch.no_grad():
            some = tree_logprobs(network, pack(rows), asked, form)
        for values, all_values, mask in zip(some, everything, masks, strict=True):
            assert values[~mask].count_nonzero() == 0
            assert largest_difference([values[mask]], [all_values[mask]]) <= 1e-5 if mask.any() else True


def test_where_nothing_is_asked_for_the_model_does_not_run(llama_folder: str) -> None:
    network = load(llama_folder).network
    network.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    network.base_model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    row = np.arange(2, 9)
    nothing = Asked(row, np.zeros(len(row), bool))
    (values,) = tree_logprobs(network, pack([row]), [nothing], HeadForm())
    assert values.tolist() == [0.0] * 7
    assert logprobs.plain_logprobs(network, row, nothing, HeadForm()).tolist() == [0.0] * 7


def test_segments_of_one_length_are_not_mistaken_for_each_other(
    llama_folder: str, rng: np.random.Generator
) -> None:
    # Three tokens each, two roots, three levels: nothing fails by its shape, only by its numbers.
    data = []
    for _ in range(2):
        root = rng.integers(2, VOCABULARY, 3)
        for _ in range(2):
            middle = rng.integers(2, VOCABULARY, 3)
            data += [datum(np.concatenate([root, middle, rng.integers(2, VOCABULARY, 3)])) for _ in range(2)]
    rows = [np.asarray(d.model_input.to_ints()) for d in data]
    assert {segment.length for segment in pack(rows).segments} == {3}
    ours, plain = on_a_tree(load(llama_folder).network, data), by_itself(load_plain(llama_folder), data)
    assert largest_difference(ours, plain) <= 1e-5


def test_a_padded_vocabulary_counts_in_the_normaliser(
    model_folders: dict[str, Path], rng: np.random.Generator
) -> None:
    # Tokens above 150 are never seen, as where the embedding is padded to a round number of rows.
    folder = model_folders["llama"]
    data = [datum(rng.integers(2, 150, 10)) for _ in range(2)]
    ours, plain = on_a_tree(load(folder).network, data), load_plain(folder)
    assert largest_difference(ours, by_itself(plain, data)) <= 1e-5
    cut = plain_logits(plain, data[0].model_input.to_ints())[:, :150].log_softmax(dim=-1)
    targets = data[0].loss_fn_inputs["target_tokens"].to_torch()
    assert (cut.gather(1, targets[:, None])[:, 0] - ours[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_rejected_side_cannot_see_the_chosen_one(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    network = load(model_folders[name]).network
    prompt, chosen, rejected = (rng.integers(2, VOCABULARY, n) for n in (9, 7, 5))
    rejected[0] = (chosen[0] + 1) % VOCABULARY
    perturbed = chosen.copy()
    perturbed[1:] = (perturbed[1:] + 17) % VOCABULARY
    pair, changed = (
        on_a_tree(network, [datum(np.concatenate([prompt, side])) for side in (first, rejected)])
        for first in (chosen, perturbed)
    )
    assert torch.equal(pair[1], changed[1])
    assert not torch.equal(pair[0], changed[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_chosen_side_cannot_see_the_rejected_one(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    network = load(model_folders[name]).network
    prompt, chosen, rejected = (rng.integers(2, VOCABULARY, n) for n in (9, 7, 5))
    rejected[0] = (chosen[0] + 1) % VOCABULARY
    perturbed = rejected.copy()
    perturbed[1:] = (perturbed[1:] + 17) % VOCABULARY
    pair, changed = (
        on_a_tree(network, [datum(np.concatenate([prompt, side])) for side in (chosen, second)])
        for second in (rejected, perturbed)
    )
    assert torch.equal(pair[0], changed[0])
    assert not torch.equal(pair[1], changed[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_token_sees_a_later_one(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    network = load(model_folders[name]).network
    data = forest(rng)
    tokens = np.asarray(data[0].model_input.to_ints())
    targets = data[0].loss_fn_inputs["target_tokens"].to_numpy()
    changed = tokens.copy()
    changed[12:] = (changed[12:] + 5) % VOCABULARY
    one = on_a_tree(network, [datum(tokens, targets), data[1]])[0]
    two = on_a_tree(network, [datum(changed, targets), data[1]])[0]
    assert torch.equal(one[:12], two[:12])
    assert not torch.equal(one[12:], two[12:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_has_the_same_numbers_alone_and_in_any_batch(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    network = load(model_folders[name]).network
    data = forest(rng)
    alone = [on_a_tree(network, [d])[0] for d in data]
    assert largest_difference(on_a_tree(network, data), alone) <= 1e-5
    assert largest_difference(on_a_tree(network, data[::-1])[::-1], alone) <= 1e-5
    for order in permutations(range(3)):
        together = on_a_tree(network, [data[i] for i in order])
        assert largest_difference(together, [alone[i] for i in order]) <= 1e-5


def test_several_targets_at_a_position_are_scored_like_one_by_one(
    model_folders: dict[str, Path], rng: np.random.Generator
) -> None:
    folder = model_folders["llama"]
    network, plain = load(folder).network, load_plain(folder)
    prompt = rng.integers(2, VOCABULARY, 6)
    rows = [np.concatenate([prompt, rng.integers(2, VOCABULARY, n)]) for n in (5, 3)]
    wide = [datum(row, rng.integers(0, VOCABULARY, (len(row), 4))) for row in rows]
    ours = on_a_tree(network, wide)
    assert [tuple(values.shape) for values in ours] == [(11, 4), (9, 4)]
    assert largest_difference(ours, by_itself(plain, wide)) <= 1e-5
    for column in range(4):
        narrow = [
            datum(row, d.loss_fn_inputs["target_tokens"].to_numpy()[:, column])
            for row, d in zip(rows, wide, strict=True)
        ]
        assert largest_difference(on_a_tree(network, narrow), [values[:, column] for values in ours]) == 0


def test_all_targets_of_a_position_sum_to_one(llama_folder: str, rng: np.random.Generator) -> None:
    row = rng.integers(2, VOCABULARY, 10)
    everything = np.tile(np.arange(VOCABULARY), (len(row), 1))
    scores = on_a_tree(load(llama_folder).network, [datum(row, everything)])[0]
    assert torch.allclose(scores.exp().sum(dim=1), torch.ones(len(row)), atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_that_differ_in_their_first_token_are_told_apart_there(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str
) -> None:
    # The branch point is one position with two targets: each side is scored with its own.
    folder = model_folders[name]
    prompt = rng.integers(2, VOCABULARY, 8)
    sequences = [np.concatenate([prompt, [first], [40, 41]]) for first in (50, 60)]
    data = [datum(sequence[:-1], sequence[1:]) for sequence in sequences]
    ours, plain = on_a_tree(load(folder).network, data), load_plain(folder)
    scores = plain_logits(plain, prompt.tolist()).detach().log_softmax(dim=-1)[-1]
    assert abs(float(ours[0][7] - scores[50])) <= 1e-5
    assert abs(float(ours[1][7] - scores[60])) <= 1e-5
    assert abs(float(ours[0][7] - ours[1][7])) > 0.01
    assert largest_difference(ours, by_itself(plain, data)) <= 1e-5


@pytest.mark.parametrize("form", [None, HeadForm()], ids=["own head", "fused head"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engines_own_path_without_a_tree_gives_the_same_numbers(
    model_folders: dict[str, Path], rng: np.random.Generator, name: str, form: HeadForm | None
) -> None:
    data = forest(rng)
    network = AutoModelForCausalLM.from_pretrained(model_folders[name], dtype=torch.float32).eval()
    with torch.no_grad():
        ours = [
            logprobs.plain_logprobs(network, np.asarray(d.model_input.to_ints()), asked_of(d), form)
            for d in data
        ]
    assert largest_difference(ours, by_itself(load_plain(model_folders[name]), data)) <= 1e-5


def test_reductions_are_float32_in_a_bfloat16_model(llama_folder: str, rng: np.random.Generator) -> None:
    base = load(llama_folder, "bfloat16")
    assert base.attention == "tree"
    data = forest(rng)
    ours = on_a_tree(base.network, data)
    assert all(values.dtype is torch.float32 for values in ours)
    # bfloat16 log-probabilities around -5 would lie on a grid of 1/32.
    assert any(float((values * 32 - (values * 32).round()).abs().max()) > 0.01 for values in ours)
    assert largest_difference(ours, by_itself(load_plain(llama_folder), data)) <= 0.5
