"""What is shipped under `examples/` is what it says."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

from training.recipes import dpo_loop, orpo_loop, sft_loop
from training.utils.data_forms import Target, convert_file
from training.utils.preference_data import read_preferences
from training.utils.preference_examples import ChatExample

EXAMPLES = Path(__file__).parent.parent / "examples"


CONFIGURATIONS = sorted(EXAMPLES.glob("**/*.yaml"))
assert CONFIGURATIONS, "no example configuration was found"


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_example_configuration_loads(path: Path) -> None:
    """Each is named by its recipe."""
    recipe = {"dpo": dpo_loop, "orpo": orpo_loop, "sft": sft_loop}[path.stem]
    settings = recipe.Config(**yaml.safe_load(path.read_text()))
    for data in filter(None, (settings.dataset, settings.eval_dataset)):
        assert (EXAMPLES.parent / data).exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_finds_what_it_imports(path: Path) -> None:
    """The demo itself is run by a slow test; a name that has moved shows here."""
    assert runpy.run_path(str(path), run_name="imported")["__doc__"]


def test_the_demo_set_has_both_forms_of_the_guide_and_shares_no_question() -> None:
    train = read_preferences(EXAMPLES / "preferences/train.jsonl")
    heldout = read_preferences(EXAMPLES / "preferences/heldout.jsonl")
    assert (train.format, len(train.examples)) == ("messages", 176)
    assert (heldout.format, len(heldout.examples)) == ("preferred_output", 32)
    asked = [
        {
            example.prompt[-1]["content"].lower()
            for example in file.examples
            if isinstance(example, ChatExample)
        }
        for file in (train, heldout)
    ]
    assert [len(questions) for questions in asked] == [176, 32]
    assert asked[0].isdisjoint(asked[1])
    settings = dpo_loop.Config(**yaml.safe_load((EXAMPLES / "preferences/dpo.yaml").read_text()))
    assert not {prompt.lower() for prompt in settings.sample_prompts} & (asked[0] | asked[1])


def test_the_raw_loop_starts_without_a_margin_and_gains_one() -> None:
    margins = runpy.run_path(str(EXAMPLES / "raw_api_loop.py"))["train"]()
    assert margins[0] == 0
    assert margins == sorted(margins)
    assert margins[-1] > 1


def test_the_custom_loss_trains_and_keeps_the_chosen_answers(tmp_path: Path) -> None:
    """That its term does what it is for: without it the chosen answers end less likely than with it."""
    module = runpy.run_path(str(EXAMPLES / "custom_loss.py"))
    chosen = {}
    for alpha in (0.0, 1e-3):
        config = module["example"](str(tmp_path / str(alpha))).model_copy(update={"alpha": alpha})
        summary = module["main"](config)
        assert summary.after["margin"] > summary.before["margin"] + 0.5
        chosen[alpha] = summary.after["delta_logp/chosen"]
    assert chosen[1e-3] > chosen[0.0]


@pytest.mark.parametrize("loss", ["plackett_luce", "sigmoid"])
def test_the_ranked_lists_teach_their_order(tmp_path: Path, loss: str) -> None:
    settings = yaml.safe_load((EXAMPLES / "ranked_lists/dpo.yaml").read_text())
    small = {"base_model": "tiny-llama", "learning_rate": 1e-3, "loss": loss}
    places = {"dataset": str(EXAMPLES / "ranked_lists/lists.jsonl"), "log_path": str(tmp_path / "run")}
    summary = dpo_loop.main(dpo_loop.Config(**{**settings, **small, **places}))
    assert summary.before["accuracy"] == 0
    assert summary.after["accuracy"] > 0.5
    assert summary.after["margin"] > 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [step["train/loss"] for step in map(json.loads, lines) if "train/loss" in step]
    assert losses[-1] < 0.7 * losses[0]


def test_the_conversations_of_sft_are_the_chosen_answers_of_the_preferences(tmp_path: Path) -> None:
    made, pairs = tmp_path / "chats.jsonl", EXAMPLES / "preferences/train.jsonl"
    convert_file(str(pairs), Target("messages", "chosen"), made, "fail", print)
    assert made.read_bytes() == (EXAMPLES / "sft_then_dpo/chats.jsonl").read_bytes()


def test_sft_and_then_dpo_each_learn_and_the_second_starts_from_the_first(tmp_path: Path) -> None:
    folder = EXAMPLES / "sft_then_dpo"
    sft, dpo = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("sft", "dpo"))
    assert dpo["warm_start_from_adapter"] == f"{sft['log_path']}/adapter"
    small = {"base_model": "tiny-llama", "learning_rate": 1e-3}
    chats = {"dataset": str(folder / "chats.jsonl"), "max_examples": 64, "log_path": str(tmp_path / "sft")}
    learned = sft_loop.main(sft_loop.Config(**{**sft, **small, **chats}))
    assert learned.after["sft_loss"] < learned.before["sft_loss"] - 0.2
    pairs = {name: str(EXAMPLES.parent / dpo[name]) for name in ("dataset", "eval_dataset")}
    start = {
        "warm_start_from_adapter": learned.export_path,
        "log_path": str(tmp_path / "dpo"),
        "max_pairs": 64,
    }
    preferred = dpo_loop.main(dpo_loop.Config(**{**dpo, **small, **pairs, **start}))
    assert abs(preferred.before["margin"]) < 1e-3  # the reference is what training starts from
    assert preferred.after["margin"] > 1
    assert preferred.after["accuracy"] > 0.7
