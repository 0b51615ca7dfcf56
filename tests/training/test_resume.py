"""A run that was killed, stopped or finished, and what becomes of it when it is started again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from runs import RANKS, config, numbers, outcome, write_rows

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.sdk import CheckpointError, ConfigError, NonFiniteError
from training.recipes.dpo_loop import Config, main
from training.utils import pair_learner, rendering, training_run
from training.utils.checkpoints import Listed, Retention, listed_in
from training.utils.training_settings import MAY_CHANGE_WHEN_GOING_ON

EVERYTHING_ON = {
    "epochs": 3,
    "batch_size": 2,
    "eval_fraction": 0.25,
    "eval_interval": 2,
    "dcp_save_interval": 2,
    "sample_prompts": ["Question 1?"],
    "sample_max_tokens": 4,
}


class Killed(BaseException):
    """As sudden as a test can make it inside one process: nothing of ours catches it."""


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch, settings: Config) -> None:
    """Run until a step was made and nothing of it recorded; then all is gone."""
    made = training_run.train_step
    calls = []

    def train_step(run: Any, trainers: Any, batch: Any, pairs: Any) -> dict[str, float]:
        metrics = made(run, trainers, batch, pairs)
        calls.append(batch.step)
        if batch.step == step:
            raise Killed
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "train_step", train_step)
        with pytest.raises(Killed):
            main(settings)
    assert calls[-1] == step


@RANKS
@pytest.mark.parametrize("reference_pass", ["upfront", "lazy"])
def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_was_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, reference_pass: str
) -> None:
    settings = {**EVERYTHING_ON, "reference_pass": reference_pass}
    whole = config(tmp_path / "whole", count=12, lora_rank=rank, **settings)
    main(whole)
    broken = config(tmp_path / "broken", count=12, lora_rank=rank, **settings)
    for step in (5, 6, 12):  # inside epoch 1, at an epoch's end, inside epoch 3
        kill_after(step, monkeypatch, broken)
    summary = main(broken)
    assert outcome(whole) == outcome(broken)
    assert summary.steps == 15
    assert summary.before == json.loads(Path(whole.log_path, "summary.json").read_text())["before"]


def test_a_finished_run_says_so_and_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, **EVERYTHING_ON)
    first = main(settings)
    before = outcome(settings)
    monkeypatch.setattr(training_run, "load", lambda run, service: pytest.fail("it loads a model"))
    capsys.readouterr()
    assert main(settings) == first
    assert "finished, 6 steps; more epochs continue it" in capsys.readouterr().out
    assert outcome(settings) == before


def test_more_epochs_continue_a_finished_run_and_the_schedules_new_end_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {"dcp_save_interval": 1, "epochs": 1}
    main(config(tmp_path / "run", **constant))
    capsys.readouterr()
    assert main(config(tmp_path / "run", **constant | {"epochs": 3})).steps == 9
    said = capsys.readouterr().out
    assert "epochs: 1 → 3" in said
    assert "learning-rate schedule now end at step 9 (was 3)" in said
    main(config(tmp_path / "whole", **constant | {"epochs": 3}))
    assert numbers(tmp_path / "run/run") == numbers(tmp_path / "whole/run")
    assert (tmp_path / "run/run/previous-1/adapter").is_dir()  # of the run that had finished


def test_a_run_without_checkpoints_moves_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path))
    main(config(tmp_path))
    assert f"moved to {tmp_path / 'run/previous-1'}" in capsys.readouterr().out


def test_never_moves_everything_aside_and_starts(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    main(config(tmp_path, dcp_save_interval=1, resume="never"))
    aside = tmp_path / "run/previous-1"
    assert (aside / "checkpoints/step-3").is_dir()
    assert outcome(settings)["metrics"] == numbers(aside)


def test_an_earlier_checkpoint_can_be_named_and_what_came_after_it_is_kept(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    whole = outcome(settings)
    main(config(tmp_path, dcp_save_interval=1, resume="step-1"))
    assert outcome(settings) == whole
    aside = tmp_path / "run/previous-1"
    assert {path.name for path in (aside / "checkpoints").iterdir()} == {"step-2", "step-3"}
    assert numbers(aside) == whole["metrics"]
    with pytest.raises(CheckpointError, match="has no checkpoint step-9; there is step-1, step-2, step-3"):
        main(config(tmp_path, dcp_save_interval=1, resume="step-9"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"beta": 0.2}, "beta: 0.1 then, 0.2 now"),
        ({"seed": 5}, "seed: 0 then, 5 now"),
        ({"batch_size": 3}, "batch_size: 2 then, 3 now"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.0 then, 0.1 now"),
        ({"lora_rank": 2}, "lora_rank: 4 then, 2 now"),
        ({"count": 7}, "pairs: 6 then, 7 now"),
    ],
    ids=str,
)
def test_another_objective_or_other_data_is_refused_with_the_difference(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    before = outcome(settings)
    with pytest.raises(CheckpointError, match=told) as caught:
        main(config(tmp_path, **{"dcp_save_interval": 1, **changed}))
    assert "--fresh" in str(caught.value)
    assert outcome(settings) == before


def test_rows_that_changed_under_the_same_name_are_other_data(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    text = Path(settings.dataset).read_text()
    Path(settings.dataset).write_text(text.replace("yes 3", "yes 4"))
    with pytest.raises(CheckpointError, match=r"dataset content: '[0-9a-f]{64}' then, '[0-9a-f]{64}' now"):
        main(settings)


def test_the_same_rows_under_another_name_are_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, dcp_save_interval=1, epochs=2)
    main(config(tmp_path, dcp_save_interval=1))
    moved = tmp_path / "moved.jsonl"
    shutil.copy(settings.dataset, moved)
    capsys.readouterr()
    assert main(Config(**settings.resolved() | {"dataset": str(moved)})).steps == 6
    assert f"→ '{moved}'" in capsys.readouterr().out


def test_what_may_change_is_shown_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path, dcp_save_interval=1))
    capsys.readouterr()
    main(config(tmp_path, dcp_save_interval=1, epochs=2, learning_rate=1e-4))
    assert "learning_rate: 0.003 → 0.0001" in capsys.readouterr().out
    assert numbers(tmp_path / "run")[-1]["train/lr"] == 1e-4


def test_every_setting_is_known_by_whether_a_run_may_go_on_with_another() -> None:
    """A new setting counts as one that makes another run until somebody says otherwise here."""
    fixed = set(Config.model_fields) - MAY_CHANGE_WHEN_GOING_ON
    assert fixed == {
        *("loss", "beta", "label_smoothing", "simpo_gamma", "ld_alpha", "ld_reference", "sft_weight"),
        *("lora_rank", "lora_alpha"),
        *("init_from_checkpoint", "init_optimizer", "warm_start_from_adapter", "reference"),
        *(
            "batch_size",
            "seed",
            "shuffle",
            "max_seq_len",
            "truncate",
            "on_bad_row",
            "max_pairs",
            "eval_fraction",
        ),
    }
    assert set(Config.model_fields) >= MAY_CHANGE_WHEN_GOING_ON - {"eval_dataset content"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")], ids=["bit", "gone", "empty"]
)
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "state.json", "notes.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_offered(
    tmp_path: Path, damage: Callable[[Path], object], name: str
) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    damage(tmp_path / "run/checkpoints/step-3" / name)
    longer = config(tmp_path, dcp_save_interval=1, epochs=2)
    with pytest.raises(CheckpointError, match=rf"step-3 is damaged: .*{name}.*--resume-from step-2"):
        main(longer)
    assert main(config(tmp_path, dcp_save_interval=1, epochs=2, resume="step-2")).steps == 6


def test_where_all_are_damaged_nothing_is_offered_but_to_start_anew(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=2)
    main(settings)
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole one before it, or start anew with --fresh"):
        main(config(tmp_path, dcp_save_interval=2, epochs=2))
    assert main(config(tmp_path, dcp_save_interval=2, resume="never")).steps == 3


def test_a_checkpoint_that_the_run_was_killed_before_listing_is_gone_on_with(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    lines = (tmp_path / "run/checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/checkpoints.jsonl").write_bytes(b"".join(lines[:-1]))
    main(config(tmp_path, dcp_save_interval=1, epochs=2))
    assert [entry.step for entry in listed_in(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_another_base_under_the_same_name_is_refused_with_both_identities(
    tmp_path: Path, llama_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    settings = config(tmp_path, dcp_save_interval=1, base_model="tiny-llama", lora_rank=0, learning_rate=1e-4)
    shutil.copytree(store.fetch(load_catalog().resolve_model("tiny-llama")), model)
    settings = Config(**settings.resolved() | {"base_model": str(model)})
    main(settings)
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        next(iter(network.parameters()))[0, 0] += 1
    shutil.rmtree(model / "x", ignore_errors=True)
    os.chmod(model, 0o755)
    for file in model.glob("*.safetensors"):
        file.chmod(0o644)
        file.unlink()
    network.save_pretrained(model)
    with pytest.raises(CheckpointError, match=r"weights are [0-9a-f]{64}, they were [0-9a-f]{64}"):
        main(Config(**settings.resolved() | {"epochs": 2}))


def test_checkpoints_beyond_those_asked_for_are_pruned(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=1, epochs=3, keep_last=2, keep_every=4))
    there = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert there == {"step-4", "step-8", "step-9"}
    assert [entry.step for entry in listed_in(tmp_path / "run")] == [4, 8, 9]


def test_the_best_by_a_held_out_metric_stays() -> None:
    entries = [Listed(n, 1, {"dpo_loss": loss}) for n, loss in ((1, 0.6), (2, 0.4), (3, 0.5), (4, 0.7))]
    assert [e.step for e in Retention(last=1, best="dpo_loss").pruned(entries)] == [1, 3]
    higher = [Listed(n, 1, {"margin": m}) for n, m in ((1, 0.6), (2, 0.9), (3, 0.5))]
    assert [e.step for e in Retention(last=1, best="margin").pruned(higher)] == [1]
    assert Retention().pruned(entries) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep_every": 2, "dcp_save_interval": 1}, "keep_last"),
        ({"keep_last": 2}, "dcp_save_interval"),
        (
            {
                "keep_last": 1,
                "keep_best": "margin",
                "dcp_save_interval": 3,
                "eval_interval": 2,
                "eval_fraction": 0.2,
            },
            "multiple",
        ),
        ({"resume": "step-x"}, "resume"),
    ],
    ids=str,
)
def test_settings_that_keep_nothing_are_refused(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(tmp_path, **given)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_its_rows(tmp_path: Path) -> None:
    settings = config(tmp_path, learning_rate=1e30, dcp_save_interval=1, shuffle=False)
    with pytest.raises(
        NonFiniteError, match=r"step 2, lines 3, 4 of the training data: .*; look at these rows"
    ):
        main(settings)
    assert [entry.step for entry in listed_in(tmp_path / "run")] == [1]
    assert [record["train/step"] for record in numbers(tmp_path / "run")] == [1]


def test_steps_that_are_not_finite_are_skipped_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    summary = main(config(tmp_path, learning_rate=1e30, on_nonfinite="skip"))
    assert (summary.steps, summary.skipped_steps) == (3, 2)
    assert [r.get("train/skipped_steps") for r in numbers(tmp_path / "run")] == [None, 1, 2]


def test_a_policy_that_does_not_move_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path, learning_rate=1e-30))
    assert "warning: step 3: after 3 steps all margins are still 0" in capsys.readouterr().out


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=1))
    before = snapshot(tmp_path / "run")
    wrong = {"dcp_save_interval": 1, "warm_start_from_adapter": str(tmp_path / "none"), "resume": "never"}
    with pytest.raises(CheckpointError, match="is not a saved state"):
        main(config(tmp_path, **wrong))
    with pytest.raises(CheckpointError, match=r"then, 0\.2 now"):
        main(config(tmp_path, dcp_save_interval=1, beta=0.2))
    assert snapshot(tmp_path / "run") == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_other_questions_are_asked_after_training_and_known_not_to_have_been_before(tmp_path: Path) -> None:
    short = {"dcp_save_interval": 1, "sample_max_tokens": 3}
    main(config(tmp_path, sample_prompts=["Question 1?"], **short))
    main(config(tmp_path, sample_prompts=["Question 2?", "Question 1?"], epochs=2, **short))
    answers = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Question 2?", "Question 1?"]
    assert answers[0]["before"] is None
    assert isinstance(answers[1]["before"], str)


def test_held_out_numbers_that_are_not_finite_stop_no_checkpoint(tmp_path: Path) -> None:
    broken = {"learning_rate": 1e30, "eval_fraction": 0.3, "eval_interval": 1, "dcp_save_interval": 1}
    assert main(config(tmp_path, on_nonfinite="skip", **broken)).steps == 2
    assert [entry.step for entry in listed_in(tmp_path / "run")] == [1, 2]


def test_metrics_of_other_held_out_pairs_are_not_carried_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_rows(tmp_path / f"held-{n}.jsonl", 3, start=50 * n) for n in (1, 2))
    main(config(tmp_path, dcp_save_interval=1, eval_dataset=one))
    assert (
        main(config(tmp_path, dcp_save_interval=1, eval_dataset=two)).before != {}
    )  # that of the finished run
    assert "not read, the run is finished: eval_dataset" in capsys.readouterr().out
    summary = main(config(tmp_path, dcp_save_interval=1, eval_dataset=two, epochs=2))
    assert summary.before == {}
    assert summary.after["margin"] > 0
    assert "other held-out rows than before" in capsys.readouterr().out
    assert [bool(entry.heldout) for entry in listed_in(tmp_path / "run")] == [False] * 5 + [True]


def test_a_finished_run_whose_last_steps_have_no_checkpoint_is_finished(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=2))
    longer = config(tmp_path, dcp_save_interval=0, epochs=2)
    summary = main(longer)
    weights = outcome(longer)["weights"]
    assert main(longer) == summary
    assert outcome(longer)["weights"] == weights


def test_a_list_that_was_changed_by_hand_moves_nothing(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=1))
    listing = tmp_path / "run/checkpoints.jsonl"
    listing.write_text(listing.read_text().replace('"step":3', '"step":7'))
    before = snapshot(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"step-7 is damaged: .* is missing; go on .* --resume-from step-3"
    ):
        main(config(tmp_path, dcp_save_interval=1, epochs=2))
    listing.write_text("no list\n")
    with pytest.raises(CheckpointError, match="move it away, they are found without it"):
        main(config(tmp_path, dcp_save_interval=1, epochs=2))
    listing.unlink()
    assert main(config(tmp_path, dcp_save_interval=1, epochs=2)).steps == 6
    assert len(before) > 10


def test_a_run_that_was_taken_over_in_its_last_evaluation_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = pair_learner.evaluate

    def evaluate_and_lose(*arguments: Any, **named: Any) -> dict[str, float]:
        if (tmp_path / "run/metrics.jsonl").stat().st_size > 2000:  # not the one before training
            (tmp_path / "run/run.lock").write_text('{"pid": 1, "host": "elsewhere", "token": "x"}')
        return evaluate(*arguments, **named)

    monkeypatch.setattr(pair_learner, "evaluate", evaluate_and_lose)
    with pytest.raises(ConfigError, match="was taken over by process 1 on elsewhere"):
        main(config(tmp_path, eval_fraction=0.3))
    assert not (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/summary.json").exists()


def test_the_longest_row_that_a_trainer_takes_is_part_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firesteel.sdk import ServiceClient

    main(config(tmp_path, dcp_save_interval=1, truncate="response_end"))
    monkeypatch.setattr(ServiceClient, "longest_sequence", lambda service: 60)
    with pytest.raises(CheckpointError, match=r"longest row: \d+ then, 60 now"):
        main(config(tmp_path, dcp_save_interval=1, truncate="response_end", epochs=2))


def test_clocks_that_jump_and_days_that_pass_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template prints the date; it goes on printing that of the first start."""
    model = tmp_path / "model"
    shutil.copytree(store.fetch(load_catalog().resolve_model("tiny-llama")), model)
    (template,) = model.glob("chat_template.jinja")
    template.chmod(0o644)
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    settings = {"base_model": str(model), "dcp_save_interval": 2, "epochs": 3}
    whole, broken = (config(tmp_path / name, **settings) for name in ("whole", "broken"))
    started_on(date(2026, 2, 28), monkeypatch)
    main(whole)
    clock = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock.uniform(0, 4e9))
    kill_after(5, monkeypatch, broken)
    started_on(date(2025, 1, 1), monkeypatch)
    main(broken)
    assert outcome(broken) == outcome(whole)
    started_on(date(2026, 3, 1), monkeypatch)
    main(config(tmp_path / "other", **settings))
    assert numbers(tmp_path / "other/run") != numbers(tmp_path / "whole/run")  # the date does matter


def started_on(day: date, monkeypatch: pytest.MonkeyPatch) -> None:
    """The date that a run sees when it starts."""

    class Day(date):
        @classmethod
        def today(cls) -> date:
            return day

    monkeypatch.setattr(rendering, "date", Day)


def test_a_signal_abandons_an_evaluation_which_the_next_start_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (config(tmp_path / name, count=12, **EVERYTHING_ON) for name in ("whole", "stopped"))
    main(whole)
    evaluate, calls = pair_learner.evaluate, []

    def evaluate_interrupted(*arguments: Any, **named: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 3:  # before training, after step 2, after step 4
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(pair_learner, "evaluate", evaluate_interrupted)
        with pytest.raises(SystemExit) as ended:
            main(stopped)
    assert ended.value.code == 143
    assert listed_in(Path(stopped.log_path))[-1] == Listed(4, 1, {})
    main(stopped)
    ours, theirs = outcome(stopped), outcome(whole)
    assert ours.pop("checkpoints") != theirs.pop("checkpoints")  # the evaluation came after that checkpoint
    assert ours == theirs
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_a_thread_signals_stay_as_they_are(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, config(tmp_path)).result().steps == 3
