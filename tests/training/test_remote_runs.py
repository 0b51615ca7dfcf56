"""The recipe against a server: the same run, to the bit, as with a trainer in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import RANKS, config, outcome, sft_config, write_lists

import firesteel
from conftest import make_pairs
from firesteel.sdk import AdamParams, TrainerLost, TrainerRewound, TrainingClient
from firesteel.service.service import Service
from training.recipes import sft_loop
from training.recipes.dpo_loop import main
from training.utils.client import ReconnectableClient
from transports import Server, service_in, serving

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "eval_fraction": 0.25,
    "eval_interval": 3,
    "dcp_save_interval": 2,
    "sample_prompts": ["Question 1?"],
    "sample_max_tokens": 4,
    "verify": True,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with service_in(tmp_path / "service", "tiny-llama") as service, serving(service) as made:
        yield made


@pytest.fixture
def remote(server: Server, monkeypatch: pytest.MonkeyPatch) -> Service:
    """From here on this environment names a server."""
    monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
    monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
    return server.service


@RANKS
def test_a_run_against_a_server_is_the_run_in_this_process_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, rank: int
) -> None:
    here, there = (config(tmp_path / name, 8, lora_rank=rank, **SETTINGS) for name in ("here", "there"))
    # Homes of their own: what is cached already was computed with other rows beside it.
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    main(here)
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "another home"))
    monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
    monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
    main(there)
    assert outcome(there) == outcome(here)
    assert server.service.sessions.all() == []  # and nothing is left


@pytest.mark.parametrize("recipe", ["sft", "ranked lists"])
def test_so_is_one_of_another_recipe_or_of_ranked_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, recipe: str
) -> None:
    def run(name: str) -> dict[str, Any]:
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / name / "home"))
        if recipe == "sft":
            settings = sft_config(tmp_path / name, **SETTINGS)
            sft_loop.main(settings)
            return outcome(settings)
        ranked = config(tmp_path / name, loss="plackett_luce", **SETTINGS)
        lists = write_lists(tmp_path / name / "lists.jsonl", 8)
        main(ranked.model_copy(update={"dataset": lists}))
        return outcome(ranked)

    here = run("here")
    monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
    monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
    assert run("there") == here


def test_a_run_that_began_here_goes_on_at_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    whole = config(tmp_path / "whole", 8, **SETTINGS)
    main(whole)
    half = config(tmp_path / "half", 8, **{**SETTINGS, "epochs": 1})
    main(half)
    monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
    monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
    main(half.model_copy(update={"epochs": 2}))
    weights = "adapter/adapter_model.safetensors"
    assert Path(half.log_path, weights).read_bytes() == Path(whole.log_path, weights).read_bytes()


def lose_everything(service: Service) -> None:
    """What a restart does to a server's memory."""
    for session in service.sessions.all():
        service.sessions.end(session)


def test_a_run_whose_trainer_is_lost_goes_back_to_its_checkpoint_and_ends_with_the_same_bits(
    tmp_path: Path, remote: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lost = (config(tmp_path / name, 8, **SETTINGS) for name in ("whole", "lost"))
    main(whole)
    optim_step = ReconnectableClient.optim_step
    steps = 0

    def step_and_lose(client: ReconnectableClient, params: AdamParams) -> object:
        nonlocal steps
        steps += 1
        if steps in (4, 6):
            lose_everything(remote)
        return optim_step(client, params)

    monkeypatch.setattr(ReconnectableClient, "optim_step", step_and_lose)
    main(lost)
    assert steps > 6
    assert outcome(lost) == outcome(whole)


def test_a_run_that_saves_nothing_says_which_command_starts_it_again(
    tmp_path: Path, remote: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, 8)
    optim_step = ReconnectableClient.optim_step

    def lose(client: ReconnectableClient, params: AdamParams) -> object:
        lose_everything(remote)
        return optim_step(client, params)

    monkeypatch.setattr(ReconnectableClient, "optim_step", lose)
    with pytest.raises(TrainerLost, match=rf"no checkpoint.*: firesteel dpo {settings.log_path}/config.json"):
        main(settings)


def test_a_loop_of_ones_own_sees_that_its_trainer_was_rewound_and_to_where(
    tmp_path: Path, remote: Service, rng: Any
) -> None:
    data = make_pairs(rng, 2)
    with firesteel.connect() as service:
        made = service.create_training_client("tiny-llama", lora_rank=2)
        client = ReconnectableClient.from_training_client(made, service=service)

        def step() -> float:
            loss = client.forward_backward(data).metrics["loss:sum"]
            client.optim_step(AdamParams(1e-2))
            return loss

        step()
        client.save_state(str(tmp_path / "state"))
        losses = [step(), step()]
        lose_everything(remote)
        with pytest.raises(TrainerRewound) as caught:
            step()
        assert (caught.value.step, caught.value.checkpoint) == (1, str(tmp_path / "state"))
        assert [step(), step()] == losses


def test_a_trainer_that_is_lost_once_more_while_it_is_rewound_is_rewound(
    tmp_path: Path, remote: Service, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_pairs(rng, 2)
    with firesteel.connect() as service:
        made = service.create_training_client("tiny-llama", lora_rank=2)
        client = ReconnectableClient.from_training_client(made, service=service)
        client.save_state(str(tmp_path / "state"))
        expected = client.forward(data).metrics["loss:sum"]
        load = TrainingClient.load_state_with_optimizer
        losses = iter([True, True, False])

        def lose_and_load(self: TrainingClient, path: str) -> Any:
            if next(losses):
                lose_everything(remote)
            return load(self, path)

        monkeypatch.setattr(TrainingClient, "load_state_with_optimizer", lose_and_load)
        lose_everything(remote)
        with pytest.raises(TrainerRewound):
            client.forward(data)
        assert next(losses, None) is None
        assert client.forward(data).metrics["loss:sum"] == expected


def test_a_loop_that_has_saved_nothing_is_told_that_its_trainer_is_lost(remote: Service, rng: Any) -> None:
    service = firesteel.connect()
    made = service.create_training_client("tiny-llama", lora_rank=2)
    client = ReconnectableClient.from_training_client(made, service=service)
    lose_everything(remote)
    with pytest.raises(TrainerLost, match=r"saved no state.*load_state_with_optimizer\(PATH\)"):
        client.forward(make_pairs(rng, 1))
    service.close()  # what is gone needs no unloading
