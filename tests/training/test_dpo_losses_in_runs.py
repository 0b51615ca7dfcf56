"""The DPO family as settings of the recipe: which belong together, and that each trains on a real model."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import config, numbers, outcome

from firesteel.sdk import CheckpointError, ConfigError, RowError
from firesteel.sealed import new_folder
from firesteel.store import home
from training.recipes.dpo_loop import Config, main
from training.utils.preference_data import read_preferences

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"label_smoothing": 0.1, "sft_weight": 0.1},
    "robust": {"label_smoothing": 0.1},
    "hinge": {"beta": 0.5},
    "ipo_sum": {},
    "ipo_mean": {"beta": 1.0},
    "sigmoid_norm": {"beta": 2.0},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0},
    "ld": {"ld_alpha": 0.5, "ld_reference": False},
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def run_of(folder: Path, loss: str, **settings: Any) -> Config:
    return config(folder, 12, loss=loss, **{"epochs": 3, **LOSSES[loss], **settings})


@every_loss
def test_each_loss_falls_on_a_real_run_and_orders_the_pairs(tmp_path: Path, loss: str) -> None:
    settings = run_of(tmp_path, loss, eval_fraction=0.2)
    summary = main(settings)
    assert summary.after["dpo_loss"] < summary.before["dpo_loss"]
    assert summary.after["margin"] > summary.before["margin"] + 0.05
    assert summary.after["accuracy"] == 1


def test_hinge_that_lets_every_pair_go_is_told_once_and_not_as_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(run_of(tmp_path, "hinge", learning_rate=2e-2, epochs=6))
    zero = [line for line in numbers(tmp_path / "run") if line.get("train/grad_norm") == 0]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert len(zero) > 3
    (warning,) = said
    assert f"warning: step {zero[0]['train/step']}: loss and gradient are exactly 0" in warning
    assert "read the same" not in warning


@every_loss
def test_the_settings_that_a_run_writes_make_the_same_run(tmp_path: Path, loss: str) -> None:
    settings = run_of(tmp_path, loss)
    assert Config(**settings.resolved()) == settings
    assert Config(**settings.resolved()).objective == settings.objective


def test_simpo_asks_no_reference(tmp_path: Path) -> None:
    cache = home() / "reference_cache.sqlite"
    before = cache.read_bytes() if cache.exists() else None
    summary = main(run_of(tmp_path, "simpo"))
    assert (cache.read_bytes() if cache.exists() else None) == before
    assert summary.reference_seconds == 0
    assert not [name for name in numbers(tmp_path / "run")[-1] if "delta_logp" in name]


def test_a_simpo_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", "simpo", dcp_save_interval=2, epochs=2)
    main(whole)
    cut = run_of(tmp_path / "cut", "simpo", dcp_save_interval=2, epochs=1)
    main(cut)
    again = cut.model_copy(update={"epochs": 2})
    main(again)
    assert outcome(again)["weights"] == outcome(whole)["weights"]


def test_another_loss_is_another_run(tmp_path: Path) -> None:
    main(run_of(tmp_path, "sigmoid", dcp_save_interval=2, epochs=1))
    other = run_of(tmp_path, "ipo_sum", dcp_save_interval=2, epochs=2)
    with pytest.raises(CheckpointError, match="loss"):
        main(other)


def test_a_checkpoint_of_before_there_was_a_choice_is_of_sigmoid(tmp_path: Path) -> None:
    settings = run_of(tmp_path, "sigmoid", dcp_save_interval=2, epochs=1, label_smoothing=0.0, sft_weight=0.0)
    main(settings)
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        forget(folder, "loss", "sft_weight", "recipe")
    main(settings.model_copy(update={"epochs": 2}))
    with pytest.raises(CheckpointError, match="loss"):
        main(run_of(tmp_path, "hinge", dcp_save_interval=2, epochs=4))


def forget(folder: Path, *names: str) -> None:
    """Make a checkpoint that does not know these settings."""
    notes = json.loads((folder / "notes.json").read_bytes())
    for part in notes["identity"].values():
        for name in names:
            part.pop(name, None)
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    shutil.rmtree(folder)
    with new_folder(folder, 0) as writer:
        for name, content in written.items():
            if name == "notes.json":
                writer.write_json(name, notes)
            else:
                writer.write(name, [content])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo"}, "ipo is two losses: ipo_sum .* or ipo_mean"),
        ({"loss": "dpop"}, "loss"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            "label_smoothing is not read by loss hinge, only by sigmoid, robust",
        ),
        ({"simpo_gamma": 0.5}, "simpo_gamma is not read by loss sigmoid, only by simpo"),
        ({"loss": "ld"}, "loss ld needs its ld_alpha"),
        ({"loss": "ipo_sum", "ld_alpha": 0.5}, "ld_alpha is not read by loss ipo_sum, only by ld"),
        ({"loss": "sigmoid", "ld_reference": False}, "ld_reference is not read by loss sigmoid, only by ld"),
        ({"loss": "simpo", "reference": "base"}, "reference is not read by loss simpo"),
        ({"loss": "simpo", "reference_pass": "lazy"}, "reference_pass is not read by loss simpo"),
        ({"loss": "robust", "label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "robust"}, "loss robust needs a label_smoothing above 0: .*loss sigmoid"),
        ({"loss": "robust", "label_smoothing": 0}, "loss robust needs a label_smoothing above 0"),
        ({"sft_weight": -1}, "sft_weight"),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)


def rows_with(path: Path, weights: list[Any]) -> Path:
    rows = [
        {"prompt": f"Question {n}?", "chosen": " yes", "rejected": " no"}
        | ({} if w is None else {"weight": w})
        for n, w in enumerate(weights)
    ]
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_a_row_says_how_much_it_counts(tmp_path: Path) -> None:
    examples = read_preferences(rows_with(tmp_path / "rows.jsonl.gz", [None, 2, 0.25])).examples
    assert [example.weight for example in examples] == [1, 2, 0.25]


@pytest.mark.parametrize("weight", [0, -1, True, "2", 1e-9, [1], 1e999])
def test_a_weight_that_is_no_number_above_0_is_refused_with_its_line(tmp_path: Path, weight: Any) -> None:
    path = tmp_path / "rows.jsonl"
    lines = rows_with(path, [1]).read_text()
    path.write_text(
        lines + json.dumps({"prompt": "?", "chosen": " a", "rejected": " b", "weight": weight}) + "\n"
    )
    with pytest.raises(RowError, match=r"rows\.jsonl:2: weight"):
        read_preferences(path)


def test_the_weights_of_rows_reach_the_loss_of_a_run(tmp_path: Path) -> None:
    """Two rows that pull against each other: the heavier wins."""
    margins = []
    for heavy in (0, 1):
        folder = tmp_path / str(heavy)
        folder.mkdir()
        sides = ({"chosen": " yes", "rejected": " no"}, {"chosen": " no", "rejected": " yes"})
        rows = [{"prompt": "Well?", **side, "weight": 9 if n == heavy else 1} for n, side in enumerate(sides)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "held.jsonl").write_text(json.dumps({"prompt": "Well?", **sides[0]}) + "\n")
        settings = config(folder, lora_rank=4, epochs=5)
        files = {"dataset": str(folder / "rows.jsonl"), "eval_dataset": str(folder / "held.jsonl")}
        margins.append(main(settings.model_copy(update=files)).after["margin"])
    assert margins[0] > 0.05
    assert margins[1] < -0.05
