"""`firesteel runs` and `firesteel export`, on real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from runs import RANKS, config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.cli.main import app
from firesteel.sdk import CheckpointError, ConfigError
from training.recipes.dpo_loop import main
from training.utils.run_folder import RunFolder

TOKENS = torch.tensor([[5, 9, 33, 70, 101, 8]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, `lora` and `full`."""
    made = tmp_path_factory.mktemp("folder")
    for name, rank in (("lora", 4), ("full", 0)):
        main(config(made / name, lora_rank=rank, epochs=2, dcp_save_interval=3))
    return made


def firesteel(*arguments: object) -> str:
    """What it prints; its errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def logits(network: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return network(TOKENS).logits.numpy()


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(store.fetch(load_catalog().resolve_model("tiny-llama")))


def test_an_exported_adapter_is_read_by_peft_and_merged_gives_the_same_logits(
    folder: Path, tmp_path: Path
) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert firesteel("export", folder / "lora/run", "--to", adapter).strip() == str(adapter)
    firesteel("export", folder / "lora/run", "--format", "merged", "--to", merged)
    by_peft = logits(PeftModel.from_pretrained(base(), adapter))
    plain = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert np.abs(by_peft - plain).max() < 1e-5
    assert np.abs(plain - logits(base())).max() > 1e-2
    own = logits(AutoPeftModelForCausalLM.from_pretrained(folder / "lora/run/adapter"))
    assert np.array_equal(by_peft, own)  # the newest checkpoint is the end of the run
    assert (merged / "tokenizer_config.json").exists()


def test_a_step_can_be_named(folder: Path, tmp_path: Path) -> None:
    steps = {}
    for step in (3, 6):
        target = Path(firesteel("export", folder / "lora/run", "--step", step).strip())
        assert target == folder / f"lora/run/exports/step-{step}-peft"
        steps[step] = logits(PeftModel.from_pretrained(base(), target))
        shutil.rmtree(target)
    assert np.abs(steps[3] - steps[6]).max() > 1e-3
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there is 3, 6"):
        firesteel("export", folder / "lora/run", "--step", 4)


def test_all_weights_are_exported_as_a_model(folder: Path, tmp_path: Path) -> None:
    firesteel("export", folder / "full/run", "--step", 6, "--to", tmp_path / "model")
    ours, own = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", folder / "full/run/model")
    )
    assert np.array_equal(logits(ours), logits(own))
    with pytest.raises(ConfigError, match="there is no adapter in it"):
        firesteel("export", folder / "full/run", "--format", "peft")


def test_nothing_is_exported_over_what_is_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        firesteel("export", folder / "lora/run", "--to", tmp_path)


@RANKS
def test_a_run_without_checkpoints_exports_its_last_adapter(tmp_path: Path, rank: int) -> None:
    main(config(tmp_path, lora_rank=rank))
    if rank:
        firesteel("export", tmp_path / "run", "--format", "merged", "--to", tmp_path / "merged")
        ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        own = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter"))
        assert np.abs(ours - own).max() < 1e-5
    else:
        with pytest.raises(CheckpointError, match="is a whole model already"):
            firesteel("export", tmp_path / "run")


def test_runs_are_listed_and_shown(folder: Path) -> None:
    rows = {
        Path(row["path"]).parent.name: row for row in json.loads(firesteel("runs", "list", folder, "--json"))
    }
    assert set(rows) == {"lora", "full"}
    assert (rows["lora"]["state"], rows["lora"]["step"], rows["lora"]["checkpoints"]) == (
        "finished",
        6,
        [3, 6],
    )
    assert rows["full"]["bytes"] > 10**5
    table = firesteel("runs", "list", folder).splitlines()
    assert table[0].split() == ["RUN", "STATE", "STEP", "CHECKPOINTS", "SIZE", "MODEL"]
    assert len(table) == 3
    assert "train/dpo_loss" in firesteel("runs", "show", folder / "lora/run")
    assert json.loads(firesteel("runs", "show", folder / "lora/run", "--json")) == rows["lora"]
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        firesteel("runs", "show", folder)


def test_a_run_is_deleted_with_what_is_its_own(tmp_path: Path) -> None:
    main(config(tmp_path))
    main(config(tmp_path))
    (tmp_path / "run/notes.txt").write_text("mine")
    assert CliRunner().invoke(app, ["runs", "rm", str(tmp_path / "run")], input="n\n").exit_code == 1
    held = RunFolder.open(str(tmp_path / "run"))
    assert json.loads(firesteel("runs", "list", tmp_path, "--json"))[0]["state"] == "running"
    with pytest.raises(ConfigError, match=r"another run \(process \d+ on .*\) is writing to"):
        firesteel("runs", "rm", tmp_path / "run", "--yes")
    held.close()
    firesteel("runs", "rm", tmp_path / "run", "--yes")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
