"""The code blocks of the guide "Cookbook: DPO", character by character (`guide/*.py`), run as they stand."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from firesteel import sdk as tinker
from training.utils import build_dpo_datums

GUIDE = Path(__file__).parent / "guide"
SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
REFERENCE_LINE = f'        reference_training_shape_id="{SHAPE}-forward",\n'
QUESTIONS = ("What is two plus two?", "Name a colour.", "Say hello.", "Which way is up?", "Is water wet?")


def block(name: str) -> str:
    """One block of the guide."""
    return (GUIDE / f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture(params=["POLICY_TRAINER", "LORA_TRAINER"])
def policy_mode(request: pytest.FixtureRequest) -> str:
    """What the guide's policy shape is mapped to."""
    mode: str = request.param
    return mode


@pytest.fixture(autouse=True)
def _the_guides_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy_mode: str) -> None:
    """The environment that the guide's code expects, its names mapped to what a laptop has."""
    (tmp_path / "catalog.yaml").write_text(
        f"""
models:
  accounts/fireworks/models/qwen3-8b: {{source: tiny-llama}}
  Qwen/Qwen3-8B: {{source: tiny-llama}}
shapes:
  {SHAPE}: {{base_model: "*", mode: {policy_mode}, device: cpu, dtype: float32}}
  {SHAPE}-forward: {{base_model: "*", mode: LORA_TRAINER, device: cpu, dtype: float32}}
"""
    )
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "catalog.yaml"))
    monkeypatch.setenv("FIREWORKS_BASE_URL", "local")
    monkeypatch.setenv("FIREWORKS_API_KEY", "any")
    monkeypatch.chdir(tmp_path)


def token_dataset() -> list[tuple[list[int], list[int], int]]:
    """(chosen, rejected, prompt length): bytes are tiny-llama's tokens."""
    rows = []
    for question in QUESTIONS:
        prompt = list(question.encode())
        rows.append(([*prompt, *b" Yes."], [*prompt, *b" No, never."], len(prompt)))
    return rows


def run_step_by_step(provision: str, passes: int) -> dict[str, Any]:
    """Provision, cache, loss and loop in one namespace; the loop `passes` times."""
    namespace: dict[str, Any] = {
        "tinker": tinker,
        "build_dpo_datums": build_dpo_datums,
        "dataset": token_dataset(),
    }
    exec(provision, namespace)
    exec(block("cache"), namespace)
    exec(block("loss"), namespace)
    results = []
    for _ in range(passes):
        exec(block("loop"), namespace)
        results.append(namespace["result"].metrics)
    namespace["results"] = results
    return namespace


def check_learning(namespace: dict[str, Any]) -> None:
    """The policy moves towards the chosen responses; the reference stands still; everything ends well."""
    margins = [metrics["margin"] for metrics in namespace["results"]]
    assert margins == sorted(margins)
    assert margins[-1] > margins[0] + 0.01
    cached = namespace["ref_cache"][0]
    datums = build_dpo_datums(cached["chosen_tokens"], cached["rejected_tokens"], cached["prompt_len"])
    again = namespace["reference_client"].forward(list(datums), "cross_entropy").loss_fn_outputs
    assert again[0]["logprobs"].data == cached["ref_chosen"]
    assert again[1]["logprobs"].data == cached["ref_rejected"]
    namespace["service"].close()
    namespace["service"].close()


@pytest.mark.parametrize("policy_mode", ["POLICY_TRAINER"], indirect=True)
def test_the_steps_of_the_guide_run_as_they_stand_for_a_full_parameter_policy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    namespace = run_step_by_step(block("provision"), passes=4)
    assert namespace["service"].reference_trainer_job_id is not None
    check_learning(namespace)
    steps = capsys.readouterr().out.splitlines()
    printed = [line.split(": ", 1) for line in steps]
    assert [step for step, _ in printed] == ["Step 1"] * 4  # the loop starts counting anew each time
    assert {"dpo_loss", "margin", "accuracy"} <= set(ast.literal_eval(printed[0][1]))
    assert ast.literal_eval(printed[0][1])["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("policy_mode", ["LORA_TRAINER"], indirect=True)
def test_the_steps_of_the_guide_run_for_a_lora_policy_that_shares_its_base() -> None:
    provision = block("provision").replace("lora_rank=0", "lora_rank=8").replace(REFERENCE_LINE, "")
    assert "forward" not in provision
    namespace = run_step_by_step(provision, passes=4)
    assert namespace["service"].reference_trainer_job_id is None
    check_learning(namespace)


@pytest.mark.parametrize("policy_mode", ["LORA_TRAINER"], indirect=True)
def test_the_steps_of_the_guide_run_for_a_lora_policy_with_a_reference_of_its_own() -> None:
    namespace = run_step_by_step(block("provision").replace("lora_rank=0", "lora_rank=8"), passes=4)
    assert namespace["service"].reference_trainer_job_id is not None
    check_learning(namespace)


@pytest.mark.parametrize(
    ("policy_mode", "rank"), [("POLICY_TRAINER", 0), ("LORA_TRAINER", 8)], indirect=["policy_mode"]
)
def test_the_first_pair_of_the_guides_loop_has_loss_ln_2(rank: int) -> None:
    namespace = run_step_by_step(block("provision").replace("lora_rank=0", f"lora_rank={rank}"), passes=0)
    first = namespace["ref_cache"][0]
    loss_fn = namespace["make_dpo_loss_fn"](first["ref_chosen"], first["ref_rejected"])
    datums = build_dpo_datums(first["chosen_tokens"], first["rejected_tokens"], first["prompt_len"])
    result = namespace["policy_client"].forward_backward_custom(list(datums), loss_fn)
    assert result.metrics["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["margin"] == 0
    namespace["service"].close()


@pytest.mark.parametrize("policy_mode", ["POLICY_TRAINER"], indirect=True)
def test_the_recipe_of_the_guide_runs_as_it_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": question}]},
            "preferred_output": [{"role": "assistant", "content": "Yes."}],
            "non_preferred_output": [{"role": "assistant", "content": "No, never."}],
        }
        for question in QUESTIONS
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(block("recipe").replace("/path/to/preference_data.jsonl", str(data)), {})
    logged = [json.loads(line) for line in (tmp_path / "dpo_logs/metrics.jsonl").read_text().splitlines()]
    assert [record["train/step"] for record in logged] == [1, 2]  # 5 pairs, 4 a step
    assert logged[0]["train/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "dpo_logs/model/model.safetensors").exists()
    if importlib.util.find_spec("wandb") is None:
        (warning,) = [record.message for record in caplog.records if record.name == "firesteel"]
        assert "firesteel[wandb]" in warning
