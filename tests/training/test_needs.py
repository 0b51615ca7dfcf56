"""What a config is said to need, against what its run then has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from runs import RANKS, config, write_rows

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.finding import Finding
from firesteel.model_size import ModelSize
from firesteel.sdk import DataError
from training.recipes.dpo_loop import Config, main
from training.utils import first_rows
from training.utils.first_rows import FIRST_ROWS
from training.utils.needs import PROGRAM_BYTES, Device, RunNeeds, findings_before_torch, findings_on
from training.utils.run_folder import RunFolder

ROOMY = Device(("cpu",), 10**15)


def tiny() -> ModelSize:
    return ModelSize.of(store.fetch(load_catalog().resolve_model("tiny-llama")))


def found(settings: Config, device: Device = ROOMY) -> dict[str, Finding]:
    tiny()
    return {
        finding.subject: finding
        for finding in (*findings_before_torch(settings), *findings_on(settings, device))
    }


def problems(settings: Config, device: Device = ROOMY) -> dict[str, str]:
    return {s: f.says for s, f in found(settings, device).items() if f.verdict == "problem"}


@RANKS
def test_what_a_run_writes_is_what_was_said(tmp_path: Path, rank: int) -> None:
    settings = config(tmp_path, lora_rank=rank, dcp_save_interval=1, keep_last=2)
    said = found(settings)["disk"].values
    main(settings)
    run = Path(settings.log_path)
    (state,) = (run / "checkpoints").glob("step-3")
    written = sum((state / f"{name}.safetensors").stat().st_size for name in ("weights", "optimizer"))
    (result,) = run.glob("*/*model.safetensors")
    assert said["each_checkpoint"] == pytest.approx(written, rel=0.15)
    assert said["least"] == pytest.approx(3 * written + result.stat().st_size, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "weights", "trained"),
    [
        ({"lora_rank": 4}, 4, 0),
        ({"lora_rank": 0}, 4, 16),
        ({"lora_rank": 0, "loss": "simpo", "beta": 2.0}, 0, 16),
    ],
    ids=["a shared base", "a reference of its own", "no reference"],
)
def test_weights_are_counted_once_frozen_and_four_times_where_they_are_trained(
    tmp_path: Path, settings: dict[str, Any], weights: int, trained: int
) -> None:
    size, run = tiny(), config(tmp_path, **settings)
    said = found(run)["memory"].values
    adapter = 16 * 4 * size.per_rank if settings["lora_rank"] else 0
    assert said["stays"] == PROGRAM_BYTES + (weights + trained) * size.parameters + adapter
    assert said["activations"] == 4096 * size.activations_per_token * 4
    assert said["most"] == said["stays"] + said["activations"]


def test_activations_follow_the_token_budget(tmp_path: Path) -> None:
    said = found(config(tmp_path, trainer={"activation_token_budget": 400}))["memory"].values
    assert said["activations"] == 400 * tiny().activations_per_token * 4


def test_what_stays_must_fit_and_activations_should(tmp_path: Path) -> None:
    settings = config(tmp_path)
    said = found(settings)["memory"].values
    verdicts = [
        found(settings, Device(("cpu",), free))["memory"].verdict
        for free in (said["most"], said["most"] - 1, said["stays"], said["stays"] - 1)
    ]
    assert verdicts == ["ok", "note", "note", "problem"]


def test_a_disk_that_is_too_full_is_a_problem(tmp_path: Path) -> None:
    estimate = RunNeeds(weights=0, trained=0, activations=0, tokens=0, state=10, exported=5)
    settings = config(tmp_path, dcp_save_interval=1, keep_last=2)
    verdicts = [next(estimate.disk(settings, free)).verdict for free in (35, 34)]
    assert verdicts == ["ok", "problem"]  # a third is there before the oldest goes


def test_checkpoints_that_are_all_kept_cannot_be_said_to_fit(tmp_path: Path) -> None:
    estimate = RunNeeds(weights=0, trained=0, activations=0, tokens=0, state=10, exported=5)
    (finding,) = estimate.disk(config(tmp_path, dcp_save_interval=1), 10**9)
    assert finding.verdict == "note"
    assert "data check --estimate" in (finding.todo or "")


def test_a_missing_tracker_is_what_it_is_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("wandb", "trackio") else there(name)
    )
    settings = config(tmp_path, wandb={"project": "x"})
    assert problems(settings) == {}
    assert found(settings)["wandb"].verdict == "note"
    assert "pip install" in problems(config(tmp_path, trackio={"project": "x"}))["trackers"]


def test_a_run_that_can_start_has_no_problem_and_a_finished_one_is_noted(tmp_path: Path) -> None:
    settings = config(tmp_path)
    assert problems(settings) == {}
    assert found(settings)["log_path"].says.endswith("a new run")
    main(settings)
    assert (found(settings)["log_path"].verdict, problems(settings)) == ("note", {})


def test_what_would_stop_a_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "file").write_text("")
    wrong: dict[str, dict[str, Any]] = {
        "dataset": {"dataset": str(tmp_path / "none.jsonl")},
        "eval_dataset": {"eval_dataset": str(tmp_path / "empty.jsonl")},
        "model": {"base_model": "./nowhere"},
        "tokenizer": {"tokenizer_model": "nobody"},
        "trainer": {"trainer": {"training_shape_id": "nothing"}},
        "log_path": {"log_path": str(tmp_path / "file/run")},
    }
    for subject, settings in wrong.items():
        assert subject in problems(config(tmp_path, **settings)), subject
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in problems(config(tmp_path, base_model="org/model"))["model"]


ROW = '{"prompt": "Question?", "chosen": "yes", "rejected": "no"}\n'
OTHER = '{"chosen": "Question? yes", "rejected": "Question? no"}\n'


@pytest.mark.parametrize(
    ("rows", "fail", "skip"),
    [
        (ROW * 3, "ok", "ok"),
        ("garbage\n" * 3, "problem", "problem"),
        (ROW * 2 + "garbage\n", "problem", "note"),
        ("garbage\n" * FIRST_ROWS + ROW, "problem", "note"),
        (ROW * FIRST_ROWS + "garbage\n", "ok", "ok"),
        (ROW + OTHER, "problem", "problem"),
    ],
    ids=["good", "garbage", "one bad row", "good rows come later", "bad rows come later", "two forms"],
)
def test_the_first_rows_say_whether_a_run_would_stop_at_them(
    tmp_path: Path, rows: str, fail: str, skip: str
) -> None:
    """Against runs: those with a problem stop at the data, and of the others only one that has bad rows further on."""
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    tiny()
    for on_bad_row, verdict in (("fail", fail), ("skip", skip)):
        settings = config(tmp_path / on_bad_row, dataset=str(file), on_bad_row=on_bad_row)
        said = found(settings)["dataset"]
        assert said.verdict == verdict
        stops = verdict == "problem" or (on_bad_row == "fail" and "garbage" in rows)
        if stops:
            with pytest.raises(DataError):
                main(settings)
        else:
            assert main(settings).steps > 0


def test_it_is_said_how_much_of_the_data_was_looked_at(tmp_path: Path) -> None:
    few, many = (write_rows(tmp_path / f"{count}.jsonl", count) for count in (6, FIRST_ROWS + 1))
    says = [found(config(tmp_path, dataset=path))["dataset"].says for path in (few, many)]
    assert "its 6 rows can be read as prompt-messages" in says[0]
    assert "the first 100 rows can be read as prompt-messages; `firesteel data check" in says[1]
    assert says[1].endswith("reads all")


def test_of_long_rows_fewer_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rows, "FIRST_BYTES", 2 * len(ROW))
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW * 5)
    assert "the first 2 rows can be read" in found(config(tmp_path, dataset=str(path)))["dataset"].says


def test_a_folder_that_is_written_to_is_a_problem(tmp_path: Path) -> None:
    settings = config(tmp_path)
    main(settings)
    held = RunFolder.open(settings.log_path)
    assert "another process is writing" in problems(settings)["log_path"]
    held.close()


def test_a_model_that_is_not_here_is_noted_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    settings = config(tmp_path)
    (model,) = (f for f in findings_before_torch(settings) if f.subject == "model")
    assert (model.verdict, model.todo) == ("note", "firesteel models pull tiny-llama")
