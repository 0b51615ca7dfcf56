"""Numbers that are not finite: what they may not spoil. The model has one letter, `~`, whose embedding is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import config, numbers, outcome, sft_config, write_lists
from safetensors.torch import load_file, save_file

from firesteel.engine import tiny_llama
from firesteel.sdk import NonFiniteError, OperationError
from training.recipes import dpo_loop, orpo_loop, sft_loop
from training.utils.client import ReconnectableClient
from training.utils.heldout_rows import read_heldout
from training.utils.report import write_report


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("poisoned")
    tiny_llama.build(folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if "embed" in name]
    weights[name][ord("~")] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def chats(path: Path, count: int, bad: tuple[int, ...] = ()) -> str:
    """Rows of one turn; those with these numbers have the letter in their question."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n}{'~' if n in bad else ''}?"},
                {"role": "assistant", "content": f"yes {n}"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# A step of several parts


def test_of_a_step_whose_last_part_is_not_finite_nothing_is_left(tmp_path: Path, poisoned: str) -> None:
    rows = chats(tmp_path / "poison.jsonl", 12, bad=(3,))
    settings = {
        "base_model": poisoned,
        "dataset": rows,
        "batch_size": 4,
        "shuffle": False,
        "on_nonfinite": "skip",
        "dcp_save_interval": 1,
        "learning_rate": 1e-2,
    }
    for name, budget in (("parts", 60), ("whole", 4000)):
        given = {**settings, "trainer": {"activation_token_budget": budget}}
        summary = sft_loop.main(sft_config(tmp_path / name, **given))
        assert (summary.steps, summary.skipped_steps) == (3, 1)
    parts, whole = (numbers(tmp_path / name / "run") for name in ("parts", "whole"))
    assert [line.get("train/micro_batches", 0) for line in parts] == [0, 4, 4]  # it did come in parts
    for name in ("train/grad_norm", "train/sft_loss"):
        values = [[line[name] for line in run[1:]] for run in (parts, whole)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_where_such_a_step_ends_the_run_its_rows_are_named_and_the_step_before_is_saved(
    tmp_path: Path, poisoned: str
) -> None:
    rows = chats(tmp_path / "poison.jsonl", 12, bad=(7,))
    settings = {"base_model": poisoned, "dataset": rows, "batch_size": 4, "shuffle": False}
    given = {**settings, "dcp_save_interval": 2, "trainer": {"activation_token_budget": 60}}
    with pytest.raises(NonFiniteError, match="step 2, lines 5, 6, 7, 8 of the training data"):
        sft_loop.main(sft_config(tmp_path, **given))
    assert (tmp_path / "run/checkpoints/step-1").is_dir()


def test_a_server_that_cannot_drop_a_gradient_is_asked_only_where_there_is_one_and_then_ends_the_run(
    tmp_path: Path, poisoned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an earlier version does not know how to: going on would be with half a step."""

    def unknown(client: ReconnectableClient) -> None:
        raise OperationError("operation: 'DropGradient' is not one of …")

    monkeypatch.setattr(ReconnectableClient, "drop_gradient", unknown)
    rows = chats(tmp_path / "poison.jsonl", 8, bad=(3,))
    settings = {"base_model": poisoned, "dataset": rows, "batch_size": 4, "shuffle": False}
    settings["on_nonfinite"] = "skip"
    whole = sft_config(tmp_path / "whole", **settings, trainer={"activation_token_budget": 4000})
    assert sft_loop.main(whole).skipped_steps == 1
    parts = sft_config(tmp_path / "parts", **settings, trainer={"activation_token_budget": 60})
    with pytest.raises(OperationError, match=r"the custom loss is nan.* earlier version") as raised:
        sft_loop.main(parts)
    assert type(raised.value) is OperationError


# Held-out rows


def pairs(path: Path, count: int, bad: tuple[int, ...] = ()) -> str:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "chosen": [{"role": "assistant", "content": f"yes {n}"}],
            "rejected": [{"role": "assistant", "content": f"nope{'~' if n in bad else ''} {n}"}],
            "source": f"part {n % 2}",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(recipe: str, folder: Path, **given: Any) -> dict[str, float]:
    """The held-out metrics of a short run."""
    made = {
        "dpo": lambda: dpo_loop.main(config(folder, **given)),
        "simpo": lambda: dpo_loop.main(config(folder, loss="simpo", beta=2.0, simpo_gamma=0.5, **given)),
        "orpo": lambda: orpo_loop.main(
            orpo_loop.Config(**config(folder, **given).model_dump(exclude_unset=True))
        ),
        "sft": lambda: sft_loop.main(sft_config(folder, **given)),
    }
    return made[recipe]().after


@pytest.mark.parametrize("recipe", ["dpo", "simpo", "orpo", "sft"])
def test_held_out_rows_that_are_not_finite_are_named_counted_and_change_no_metric(
    tmp_path: Path, poisoned: str, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    rows = chats if recipe == "sft" else pairs
    bad, good = rows(tmp_path / "bad.jsonl", 6, bad=(2, 4)), tmp_path / "good.jsonl"
    lines = Path(bad).read_text().splitlines(keepends=True)
    good.write_text("".join(line for line in lines if "~" not in line))
    given = {"base_model": poisoned, "eval_interval": 1}
    with_bad = run(recipe, tmp_path / "with", eval_dataset=bad, report=True, **given)
    said = capsys.readouterr().out
    without = run(recipe, tmp_path / "without", eval_dataset=str(good), **given)
    assert with_bad.pop("nonfinite_rows") == 2
    assert with_bad == pytest.approx(without, abs=1e-6)
    assert all(map(math.isfinite, with_bad.values()))
    assert "2 rows have log-probabilities that are not finite and count in no metric (lines 3, 5)" in said
    held = read_heldout(tmp_path / "with/run", 0)
    assert held
    assert held.nonfinite_lines == [3, 5]
    assert (tmp_path / "with/run/report.html").exists()


@pytest.mark.parametrize("recipe", ["dpo", "orpo", "sft"])
def test_a_run_of_whose_held_out_rows_none_is_finite_still_ends(
    tmp_path: Path, poisoned: str, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    rows = chats if recipe == "sft" else pairs
    bad = rows(tmp_path / "bad.jsonl", 3, bad=(0, 1, 2))
    given = {"base_model": poisoned, "eval_dataset": bad, "dcp_save_interval": 1}
    after = run(recipe, tmp_path, report=True, **given)
    assert after == {"nonfinite_rows": 3}
    assert "not one row has finite log-probabilities" in capsys.readouterr().out
    evaluated = [line["train/step"] for line in numbers(tmp_path / "run") if "eval/nonfinite_rows" in line]
    assert evaluated == [0, 3]  # each once
    write_report([tmp_path / "run"])


def test_a_ranked_list_of_which_one_answer_is_not_finite_is_left_out_as_a_whole(
    tmp_path: Path, poisoned: str
) -> None:
    path = Path(write_lists(tmp_path / "lists.jsonl", 4))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["completions"][0][0]["content"] += "~"
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"base_model": poisoned, "dataset": str(path), "eval_dataset": str(tmp_path / "bad.jsonl")}
    after = dpo_loop.main(config(tmp_path / "with", loss="plackett_luce", report=True, **given)).after
    assert after.pop("nonfinite_rows") == 1
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[0], *rows[2:])))
    given["eval_dataset"] = str(tmp_path / "good.jsonl")
    without = dpo_loop.main(config(tmp_path / "without", loss="plackett_luce", **given)).after
    assert after == pytest.approx(without, abs=1e-6, nan_ok=True)
    page = (tmp_path / "with/run/report.html").read_text()
    assert "1 held-out row is left out" in page
    assert "of the 8 pairs of 3 held-out rows" in page


def test_a_run_with_such_rows_goes_on_with_the_bits_of_one_without_a_break(
    tmp_path: Path, poisoned: str
) -> None:
    bad = pairs(tmp_path / "bad.jsonl", 4, bad=(1,))
    given = {"base_model": poisoned, "eval_dataset": bad, "eval_interval": 1, "dcp_save_interval": 1}
    for name, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        dpo_loop.main(config(tmp_path / name, epochs=epochs, **given))
    whole, parts = (outcome(config(tmp_path / name, **given)) for name in ("whole", "parts"))
    assert {**parts, "checkpoints": ""} == {**whole, "checkpoints": ""}


def test_a_training_pair_that_is_not_finite_is_skipped_with_its_step_and_the_run_saves_and_goes_on(
    tmp_path: Path, poisoned: str
) -> None:
    given = {"base_model": poisoned, "dataset": pairs(tmp_path / "poison.jsonl", 6, bad=(1,))}
    given |= {"shuffle": False, "on_nonfinite": "skip", "dcp_save_interval": 1}
    for name, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        summary = dpo_loop.main(config(tmp_path / name, epochs=epochs, **given))
    assert (summary.steps, summary.skipped_steps) == (6, 2)
    whole, parts = (outcome(config(tmp_path / name, **given)) for name in ("whole", "parts"))
    assert parts["weights"] == whole["weights"]
    assert parts["metrics"] == whole["metrics"]
