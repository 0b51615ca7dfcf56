"""Where training starts from and what it is held to: every combination, and what each means for the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import RANKS, config, numbers, outcome

from firesteel.sdk import CheckpointError, ConfigError
from training.recipes.dpo_loop import Config, main
from training.utils.checkpoints import Notes, listed_in

STARTS = ["base", "checkpoint", "checkpoint with optimizer", "adapter"]


@pytest.fixture(scope="module", params=[4, 0], ids=["lora", "full-parameter"])
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that has learned something, to start from."""
    settings = config(
        tmp_path_factory.mktemp("earlier"), lora_rank=request.param, epochs=3, dcp_save_interval=3
    )
    main(settings)
    return settings


def started_from(earlier: Config, folder: Path, start: str, **settings: Any) -> Config:
    run = Path(earlier.log_path)
    given: dict[str, Any] = {
        "base": {},
        "checkpoint": {"init_from_checkpoint": str(run / "checkpoints/step-6")},
        "checkpoint with optimizer": {"init_from_checkpoint": str(run), "init_optimizer": True},
        "adapter": {"warm_start_from_adapter": str(run / "adapter")},
    }[start]
    values = {
        "lora_rank": earlier.lora_rank,
        "eval_fraction": 0.3,
        "dcp_save_interval": 1,
        **given,
        **settings,
    }
    return config(folder, count=10, **values)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("reference", ["initial", "base"])
def test_the_margin_before_the_first_step_is_0_exactly_where_the_reference_is_the_start(
    earlier: Config,
    tmp_path: Path,
    start: str,
    reference: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))  # nothing is cached yet
    if start == "adapter" and not earlier.lora_rank:
        with pytest.raises(ConfigError, match="needs a lora_rank"):
            started_from(earlier, tmp_path, start)
        return
    settings = started_from(earlier, tmp_path, start, reference=reference)
    before = main(settings).before
    moved = start != "base" and reference == "base"
    assert (abs(before["margin"]) > 1) if moved else (abs(before["margin"]) < 1e-3)
    of_base = started_from(earlier, tmp_path / "base", "base")
    capsys.readouterr()
    main(of_base)
    cached = "10 from the cache, 0 computed" in capsys.readouterr().out
    same = identity(settings) == identity(of_base)
    assert same == cached == (start == "base" or reference == "base")


def identity(settings: Config) -> str:
    run = Path(settings.log_path)
    return Notes.read(run / listed_in(run)[-1].path).reference.weights


@pytest.mark.parametrize("start", STARTS[1:])
def test_a_run_that_started_elsewhere_goes_on_against_the_reference_it_began_with(
    earlier: Config, tmp_path: Path, start: str
) -> None:
    if start == "adapter" and not earlier.lora_rank:
        return  # refused, see above
    whole = started_from(earlier, tmp_path / "whole", start, epochs=2)
    main(whole)
    parts = started_from(earlier, tmp_path / "parts", start)
    main(parts)
    main(started_from(earlier, tmp_path / "parts", start, epochs=2))
    # An evaluation follows the last step of a run of one epoch, and is no step of the whole one.
    steps = [[r for r in numbers(Path(run.log_path)) if "train/loss" in r] for run in (parts, whole)]
    assert steps[0] == steps[1]
    assert outcome(parts)["weights"] == outcome(whole)["weights"]


def test_the_starting_adapter_may_go_once_a_run_has_begun(tmp_path: Path) -> None:
    settings = config(tmp_path / "earlier", dcp_save_interval=1)
    main(settings)
    adapter = tmp_path / "adapter"
    shutil.copytree(Path(settings.log_path, "adapter"), adapter)
    given = {"warm_start_from_adapter": str(adapter), "dcp_save_interval": 1}
    main(config(tmp_path, **given))
    shutil.rmtree(adapter)
    assert main(config(tmp_path, **given, epochs=2)).steps == 6
    # What stands in for it is compared by content too.
    file = tmp_path / "run/reference/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights are [0-9a-f]{64}, they were [0-9a-f]{64}"):
        main(config(tmp_path, **given, epochs=3))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"lora_rank": 2}, "has r 4, this model's has 2"),
        ({"lora_alpha": 8.0}, "has lora_alpha 32.0, this model's has 8.0"),
    ],
    ids=str,
)
def test_an_adapter_of_other_settings_is_refused_by_their_names(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    main(config(tmp_path / "earlier"))
    with pytest.raises(CheckpointError, match=told):
        main(config(tmp_path, warm_start_from_adapter=str(tmp_path / "earlier/run/adapter"), **changed))


@RANKS
def test_a_folder_to_start_from_that_is_none_is_refused(tmp_path: Path, rank: int) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run that has one"):
        main(config(tmp_path, lora_rank=rank, init_from_checkpoint=str(tmp_path / "empty")))
    if rank:
        with pytest.raises(CheckpointError, match=r"is not a saved state .* or an adapter"):
            main(config(tmp_path, lora_rank=rank, warm_start_from_adapter=str(tmp_path / "empty")))


def test_the_optimizer_is_taken_only_where_it_is_asked_for(tmp_path: Path) -> None:
    main(config(tmp_path / "earlier", dcp_save_interval=3, epochs=2))
    start = str(tmp_path / "earlier/run")
    norms = []
    for name, optimizer in (("new", False), ("kept", True)):
        settings = config(
            tmp_path / name, init_from_checkpoint=start, init_optimizer=optimizer, dcp_save_interval=1
        )
        main(settings)
        norms.append(json.dumps(numbers(Path(settings.log_path))))
    assert norms[0] != norms[1]
    first = [json.loads(text)[0]["train/grad_norm"] for text in norms]
    assert first[0] == first[1]  # the same weights; what differs is the step that they make
