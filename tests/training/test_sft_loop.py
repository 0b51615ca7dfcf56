"""Supervised fine-tuning: its loss against transformers' plain forward, and runs on a real (tiny) model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from runs import numbers, outcome
from runs import sft_config as config

from firesteel.sdk import (
    AdamParams,
    CheckpointError,
    ConfigError,
    Datum,
    ModelInput,
    TensorData,
)
from plain import load_plain, plain_logprobs
from training.recipes import dpo_loop
from training.recipes.sft_loop import Config, main
from training.utils.client import ReconnectableClient
from training.utils.config import TrainerConfig
from training.utils.losses import make_nll_loss, weight_of
from training.utils.reference_pass import NoReferences
from training.utils.service import build_service_client
from training.utils.sft_learner import SftLearner
from training.utils.sft_rows import LearnedSequence


def sequences(rng: np.random.Generator, count: int) -> list[LearnedSequence]:
    """Random rows of several lengths that start with the same tokens, with weights between 0 and 2."""
    shared = rng.integers(5, 200, 6)
    found = []
    for line in range(1, count + 1):
        tokens = [*shared, *rng.integers(5, 200, int(rng.integers(2, 12)))]
        weights = rng.choice([0.0, 1.0, 0.5, 2.0], len(tokens) - 1)
        weights[-1] = 1.0
        inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(weights, "float32")}
        found.append(LearnedSequence(Datum(ModelInput.from_ints(tokens[:-1]), inputs), line))
    return found


def test_loss_and_gradient_of_a_step_are_those_of_the_plain_forward(
    llama_folder: str, rng: np.random.Generator
) -> None:
    items = sequences(rng, 5)
    network = load_plain(llama_folder)
    rows = [plain_logprobs(network, item.datum) for item in items]
    weights = [torch.tensor(item.datum.loss_fn_inputs["weights"].to_numpy()) for item in items]
    expected = -sum((row * w).sum() for row, w in zip(rows, weights, strict=True)) / sum(
        w.sum() for w in weights
    )
    expected.backward()
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in network.parameters() if p.grad is not None)
    )

    with build_service_client(base_model=llama_folder, lora_rank=0) as service:
        policy = ReconnectableClient(service.create_training_client(llama_folder, 0))
        result = SftLearner().accumulate(policy, items, NoReferences())
        assert result.metrics["sft_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert result.metrics["perplexity"] == pytest.approx(math.exp(expected.item()), rel=1e-5)
        assert result.metrics["learned_weight"] == pytest.approx(float(sum(w.sum() for w in weights)))
        step = policy.optim_step(AdamParams(learning_rate=0.0))
        assert step.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
        # The pure function of log-probabilities, the trainer's sum and the verification's loss are one.
        data = [item.datum for item in items]
        by_function = policy.forward_backward_custom(data, make_nll_loss(sum(map(weight_of, data))))
        assert by_function.metrics["sft_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert policy.optim_step(AdamParams(learning_rate=0.0)).metrics["grad_norm"] == pytest.approx(
            norm, rel=1e-5
        )


def test_a_row_with_many_tokens_counts_by_its_tokens_and_not_as_a_row(rng: np.random.Generator) -> None:
    """The mean is over the tokens of the step: that of per-row means is another number, and wrong (trl#2456)."""
    items = sequences(rng, 4)
    data = [item.datum for item in items]
    rows = [torch.tensor(-rng.exponential(2.0, d.model_input.length)) for d in data]
    loss, _ = make_nll_loss(sum(map(weight_of, data)))(data, rows)
    weights = [d.loss_fn_inputs["weights"].to_numpy().astype(np.float64) for d in data]
    values = [row.numpy() for row in rows]
    summed = sum(float((-v * w).sum()) for v, w in zip(values, weights, strict=True))
    assert loss.item() == pytest.approx(summed / sum(float(w.sum()) for w in weights), abs=1e-12)
    means = np.mean([float((-v * w).sum() / w.sum()) for v, w in zip(values, weights, strict=True)])
    assert abs(loss.item() - means) > 1e-3


def test_heldout_rows_have_the_loss_of_each_source_and_the_share_that_was_cut(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Question {number}?",
            "completion": " yes" * (1 + 40 * (number % 4 == 0)),
            "weight": 1 + number % 3,
            **({} if number % 4 == 1 else {"source": "long" if number % 4 == 0 else "short"}),
        }
        for number in range(12)
    ]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(
        tmp_path, eval_dataset=str(tmp_path / "held-out.jsonl"), max_seq_len=120, truncate="response_end"
    )
    summary = main(settings)
    after = summary.after
    assert after["truncated"] == 3 / 12
    assert after["sources"] == 3
    assert {name: after[f"source/{name}/count"] for name in ("long", "short", "(none)")} == {
        "long": 3,
        "short": 6,
        "(none)": 3,
    }
    # The loss of all is that of the sources by what their learned tokens weigh.
    file = tmp_path / f"run/heldout/step-{summary.steps}.jsonl"
    written = [json.loads(line) for line in file.read_text().splitlines()]
    weights = {"long": 0.0, "short": 0.0, "(none)": 0.0}
    for row in written:
        given = rows[row["line"] - 1]
        weights[given.get("source", "(none)")] += row["learned_tokens"] * given["weight"]
    parts = sum(weight * after[f"source/{name}/sft_loss"] for name, weight in weights.items())
    assert after["sft_loss"] == pytest.approx(parts / sum(weights.values()), rel=1e-6)
    assert after["source/long/sft_loss"] != pytest.approx(after["source/short/sft_loss"], rel=1e-2)
    assert numbers(tmp_path / "run")[0]["eval/truncated"] == 3 / 12
    steps = [line for line in numbers(tmp_path / "run") if "train/sft_loss" in line]
    assert {line["train/truncated"] for line in steps} == {0.0}


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_run_makes_the_answers_likely_and_says_them(tmp_path: Path, rank: int) -> None:
    settings = config(
        tmp_path, 12, lora_rank=rank, epochs=12, eval_fraction=0.2, learning_rate=1e-2 if rank else 1e-3,
        sample_prompts=("Question 3, part 0?",), sample_max_tokens=4,
    )  # fmt: skip
    summary = main(settings)
    assert summary.after["sft_loss"] < 0.7 * summary.before["sft_loss"]
    assert summary.after["perplexity"] == pytest.approx(math.exp(summary.after["sft_loss"]))
    lines = numbers(Path(settings.log_path))
    steps = [line for line in lines if "train/sft_loss" in line]
    assert steps[0]["train/loss"] == steps[0]["train/sft_loss"]
    assert steps[-1]["train/sft_loss"] < 0.5 * steps[0]["train/sft_loss"]
    assert summary.reference_job_id is None
    assert summary.reference_seconds == 0
    said = json.loads((Path(settings.log_path) / "samples.jsonl").read_text())
    assert said["after"].startswith("yes")
    assert not said["before"].startswith("yes")


def test_a_batch_whose_graph_cannot_be_kept_at_once_gives_the_same_step_in_parts(
    llama_folder: str, rng: np.random.Generator
) -> None:
    items, steps, computed = sequences(rng, 6), [], []
    for budget in (4096, 20):
        with build_service_client(
            base_model=llama_folder, trainer=TrainerConfig(activation_token_budget=budget)
        ) as service:
            policy = ReconnectableClient(service.create_training_client(llama_folder, 0))
            result = SftLearner().accumulate(policy, items, NoReferences())
            steps.append(
                (result.metrics["sft_loss"], policy.optim_step(AdamParams(0.0)).metrics["grad_norm"])
            )
            computed.append((result.metrics["scored_tokens:sum"], result.metrics["micro_batches:sum"]))
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert computed[0][0] == computed[1][0]
    assert computed[1][1] > computed[0][1]


def test_a_step_in_parts_adds_what_they_computed_and_keeps_the_largest_of_what_they_held(
    llama_folder: str, rng: np.random.Generator
) -> None:
    """Any two of these rows are over the budget: each is a part of the step."""
    items = []
    for line, length in enumerate((12, 20, 15), start=1):
        tokens = rng.integers(5, 200, length)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length - 1, np.float32)}
        items.append(LearnedSequence(Datum(ModelInput.from_ints(tokens[:-1]), inputs), line))
    budget = TrainerConfig(activation_token_budget=20)
    with build_service_client(base_model=llama_folder, trainer=budget) as service:
        policy = ReconnectableClient(service.create_training_client(llama_folder, 0))
        each = [SftLearner().accumulate(policy, [item], NoReferences()).metrics for item in items]
        step = SftLearner().accumulate(policy, items, NoReferences()).metrics
    assert step["activation_bytes:max"] == max(part["activation_bytes:max"] for part in each) > 0
    for name in ("scored_tokens:sum", "computed_tokens:sum", "micro_batches:sum"):
        assert step[name] == sum(part[name] for part in each)


def test_rows_count_by_their_weight_in_training_and_on_held_out_rows(tmp_path: Path) -> None:
    """Two rows, one of weight 3: Σ w nll / Σ w over their tokens, from runs on each row alone."""
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "the sky is", "completion": " blue and wide"}]

    def run_of(name: str, *given: dict[str, Any]) -> tuple[float, float, float]:
        folder = tmp_path / name
        folder.mkdir()
        data = folder / "mine.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        settings = config(folder, dataset=str(data), eval_dataset=str(data), batch_size=2)
        summary = main(settings)
        (step,) = [line for line in numbers(Path(settings.log_path)) if "train/sft_loss" in line]
        return step["train/sft_loss"], summary.before["sft_loss"], step["train/learned_weight"]

    alone = [run_of(str(index), row) for index, row in enumerate(rows)]
    both = run_of("both", {**rows[0], "weight": 3}, rows[1])
    weights = [3 * alone[0][2], alone[1][2]]
    assert both[2] == sum(weights)
    for place in (0, 1):
        expected = sum(w * one[place] for w, one in zip(weights, alone, strict=True)) / sum(weights)
        assert both[place] == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_does_not_depend_on_how_rows_are_batched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = []
    for size in (1, 3, 16):
        monkeypatch.setattr("training.utils.sft_learner.EVALUATED_AT_ONCE", size)
        settings = config(tmp_path / str(size), 10, eval_fraction=0.5)
        values.append(main(settings).before["sft_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] == pytest.approx(values[2], rel=1e-6)


def test_the_verification_compares_the_first_batch_with_the_plain_forward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(tmp_path, verify=True))
    assert "verify  gradient, random projection, relative" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    results = []
    for name, epochs in (("whole", (3,)), ("in parts", (1, 3))):
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / name / "home"))
        settings = config(tmp_path / name, lora_rank=rank, dcp_save_interval=1, eval_fraction=0.2)
        for count in epochs:
            main(settings.model_copy(update={"epochs": count}))
        results.append(outcome(settings))  # type: ignore[arg-type]
    assert results[0]["weights"] == results[1]["weights"]
    assert results[0]["states"] == results[1]["states"]
    assert results[0]["metrics"][-1] == results[1]["metrics"][-1]


def test_a_folder_of_another_recipe_is_not_gone_on_with(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=1))
    other = runs.config(tmp_path / "pairs", log_path=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="recipe: 'sft' then, 'dpo' now"):
        dpo_loop.main(other)


def test_settings_of_pairs_are_none_of_this_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_pairs: Config has no such setting"):
        config(tmp_path, max_pairs=3)
    with pytest.raises(ConfigError, match="keep_best: 'accuracy'; there is sft_loss"):
        config(
            tmp_path,
            keep_best="accuracy",
            keep_last=1,
            dcp_save_interval=1,
            eval_interval=1,
            eval_fraction=0.2,
        )


def test_the_settings_that_a_run_writes_make_the_same_run(tmp_path: Path) -> None:
    settings = config(tmp_path, max_examples=5)
    assert Config(**settings.resolved()) == settings


def test_max_examples_leaves_the_rest_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(config(tmp_path, 8, max_examples=3)).steps == 1
    assert "3 examples" in (said := capsys.readouterr().out)
    assert "5 not used (max_examples)" in said


@pytest.mark.parametrize(
    ("rank", "way"),
    [(4, "init_from_checkpoint"), (0, "init_from_checkpoint"), (4, "warm_start_from_adapter")],
    ids=["lora", "full-parameter", "an adapter"],
)
def test_dpo_starts_from_what_sft_made_and_is_held_to_it(tmp_path: Path, rank: int, way: str) -> None:
    settings = config(tmp_path / "sft", lora_rank=rank, epochs=4, dcp_save_interval=100)
    tuned = main(settings)
    start = settings.log_path if way == "init_from_checkpoint" else tuned.export_path
    preference = runs.config(tmp_path / "dpo", 6, lora_rank=rank, eval_fraction=0.2, **{way: start})
    summary = dpo_loop.main(preference)
    # Held to where it starts: no margin before the first step, and the answers are as likely as SFT left them.
    assert summary.before["margin"] == pytest.approx(0, abs=1e-4)
    untuned = dpo_loop.main(runs.config(tmp_path / "cold", 6, lora_rank=rank, eval_fraction=0.2))
    assert summary.before["logps/chosen"] > untuned.before["logps/chosen"] + 1
    assert summary.after["margin"] > 0
