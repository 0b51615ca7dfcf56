"""Objects of the real `tinker` package, wherever ours are taken: same numbers, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import firesteel
from conftest import make_pairs
from firesteel import sdk
from firesteel.sdk import Datum, OperationError, ServiceClient, TensorData, TrainingClient
from firesteel.sdk.conversion import as_adam_params, as_data, as_lora_config, as_sampling_params

pytestmark = pytest.mark.slow

ADAM = {
    "learning_rate": 1e-2,
    "beta1": 0.5,
    "beta2": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "grad_clip_norm": 0.5,
}


@pytest.fixture
def service() -> Iterator[ServiceClient]:
    with firesteel.connect("local") as made:
        yield made


@pytest.fixture
def ours(rng: np.random.Generator) -> list[Datum]:
    return make_pairs(rng, 2)


def theirs_of(data: list[Datum]) -> list[Any]:
    import tinker

    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(datum.model_input.to_ints()),
            loss_fn_inputs={name: np.array(value.to_numpy()) for name, value in datum.loss_fn_inputs.items()},
        )
        for datum in data
    ]


def trained(client: TrainingClient, data: list[Any], adam: Any) -> tuple[Any, list[float], list[list[float]]]:
    """Two steps: the metrics, gradient norms and log-probabilities on the way."""
    first = client.forward_backward(data).result()
    norms = [client.optim_step(adam).metrics["grad_norm"]]
    client.forward_backward_custom(
        data,
        lambda passed, lp: (
            sum(
                (a * torch.tensor(d.loss_fn_inputs["weights"].data)).sum()
                for d, a in zip(passed, lp, strict=True)
            ),
            {},
        ),
    )
    norms.append(client.optim_step(adam).metrics["grad_norm"])
    return first.metrics, norms, [o["logprobs"].data for o in client.forward(data).loss_fn_outputs]


def test_data_and_settings_of_tinker_train_with_the_same_numbers(service, llama_folder, ours) -> None:
    import tinker

    lora = tinker.LoraConfig(rank=2, seed=5, train_unembed=False)
    mine = service.create_training_client(llama_folder, lora_config=sdk.LoraConfig(rank=2, seed=5))
    other = service.create_training_client(llama_folder, lora_config=lora)
    expected = trained(mine, ours, sdk.AdamParams(**ADAM))
    assert trained(other, theirs_of(ours), tinker.AdamParams(**ADAM)) == expected
    assert other.description.lora_rank == 2


def test_the_fields_of_tinker_arrive_each_in_its_place() -> None:
    import tinker

    assert as_adam_params(tinker.AdamParams(**ADAM)) == sdk.AdamParams(**ADAM)
    assert as_adam_params(tinker.AdamParams()) == sdk.AdamParams()  # the same defaults
    lora = tinker.LoraConfig(rank=3, seed=7, train_unembed=True, train_mlp=False, train_attn=True)
    assert as_lora_config(lora) == sdk.LoraConfig(3, 32.0, 7, True, False, True)
    assert as_lora_config(tinker.LoraConfig(rank=3)) == sdk.LoraConfig(3, train_unembed=True)
    sampling = tinker.SamplingParams(max_tokens=5, seed=3, stop=[7, 8], temperature=0.5, top_k=4, top_p=0.9)
    assert as_sampling_params(sampling) == sdk.SamplingParams(5, 0.5, 0.9, 4, 3, [7, 8])
    with pytest.raises(OperationError, match="token ids"):
        as_sampling_params(tinker.SamplingParams(stop=["\n\n"]))


def test_dense_and_sparse_tensors_of_tinker_are_the_same_data(service, llama_folder) -> None:
    import tinker

    targets = torch.zeros(6, 4, dtype=torch.int64)
    weights = torch.zeros(6, 4)
    targets[2, 0], targets[5, 3], weights[2, 0], weights[5, 3] = 9, 11, 1.0, 0.5
    sparse = {
        "target_tokens": tinker.TensorData.from_torch_sparse(targets),
        "weights": tinker.TensorData.from_torch_sparse(weights),
    }
    assert sparse["target_tokens"].sparse_crow_indices is not None
    dense = {
        "target_tokens": tinker.TensorData(data=targets.flatten().tolist(), dtype="int64", shape=[6, 4]),
        "weights": tinker.TensorData.from_numpy(weights.numpy()),
    }
    tokens = tinker.ModelInput.from_ints([3, 4, 5, 6, 7, 8])
    mine = Datum(sdk.ModelInput.from_ints([3, 4, 5, 6, 7, 8]), {"target_tokens": targets, "weights": weights})  # type: ignore[dict-item]
    given = [mine, tinker.Datum(tokens, dense), tinker.Datum(tokens, sparse)]
    assert as_data(given) == (mine, mine, mine)
    answer = service.create_training_client(llama_folder, 2).forward_backward(given).result()
    numbers = [o["logprobs"] for o in answer.loss_fn_outputs]
    assert numbers[0].shape == [6, 4]
    assert numbers[0] == numbers[1]
    assert numbers[0] == numbers[2]


def test_lists_tensors_chunks_and_tensors_without_a_shape_of_tinker_are_taken() -> None:
    import tinker

    chunked = tinker.ModelInput(
        chunks=[tinker.EncodedTextChunk(tokens=[3, 4]), tinker.EncodedTextChunk(tokens=[5])]
    )
    shapeless = tinker.TensorData(data=[4, 5, 6], dtype="int64")
    assert shapeless.shape is None
    made = as_data(
        [
            tinker.Datum(model_input=chunked, loss_fn_inputs={"target_tokens": targets, "weights": weights})
            for targets, weights in (
                ([4, 5, 6], [0, 1, 1]),
                (torch.tensor([4, 5, 6]), torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16)),
                (shapeless, np.asarray([0, 1, 1], np.float32)),
            )
        ]
    )
    expected = Datum(
        sdk.ModelInput.from_ints([3, 4, 5]),
        {"target_tokens": TensorData([4, 5, 6]), "weights": TensorData([0.0, 1.0, 1.0])},
    )
    assert all(datum == sdk.Datum(datum.model_input, expected.loss_fn_inputs) for datum in made)
    assert all(datum.model_input.to_ints() == [3, 4, 5] for datum in made)


def test_an_image_of_tinker_is_refused() -> None:
    import tinker

    image = tinker.types.ImageChunk(data=b"\x89PNG", format="png")
    mixed = tinker.ModelInput(chunks=[tinker.EncodedTextChunk(tokens=[3]), image])
    with pytest.raises(OperationError, match=r"data\[0\]\.model_input\.chunks\[1\]: ImageChunk"):
        as_data([tinker.Datum(model_input=mixed, loss_fn_inputs={"target_tokens": [4]})])


def test_prompts_and_settings_of_tinker_sample_the_same_answer(service, llama_folder) -> None:
    import tinker

    client = service.create_training_client(llama_folder, 2)
    settings = {"max_tokens": 6, "seed": 3, "temperature": 0.8}
    mine = client.sample(sdk.ModelInput.from_ints([5, 6]), 2, sdk.SamplingParams(**settings)).result()
    theirs = client.sample(tinker.ModelInput.from_ints([5, 6]), 2, tinker.SamplingParams(**settings)).result()
    assert theirs == mine
    assert len(mine.sequences) == 2


def _loop(tinker: Any, service: ServiceClient, folder: str) -> tuple[float, list[float]]:
    """A piece of a loop as it is written against the `tinker` package."""
    client = service.create_training_client(
        folder, lora_config=tinker.LoraConfig(rank=2, seed=1, train_unembed=False)
    )
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([3, 4, 5]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.asarray([4, 5, 6])),
            "weights": tinker.TensorData.from_torch(torch.tensor([0.0, 1.0, 1.0])),
        },
    )
    answer = client.forward_backward([datum], "cross_entropy")
    step = client.optim_step(tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8))
    return step.metrics["grad_norm"], answer.loss_fn_outputs[0]["logprobs"].data


def test_our_sdk_stands_in_for_the_tinker_package(service, llama_folder) -> None:
    import tinker

    from firesteel import sdk as stand_in

    assert _loop(stand_in, service, llama_folder) == _loop(tinker, service, llama_folder)
