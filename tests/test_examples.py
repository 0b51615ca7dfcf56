"""What is shipped under `examples/` is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.recipes import dpo_loop, orpo_loop
from training.utils.preference_data import read_preferences
from training.utils.preference_examples import ChatExample

EXAMPLES = Path(__file__).parent.parent / "examples"


CONFIGURATIONS = sorted(EXAMPLES.glob("**/*.yaml"))
assert CONFIGURATIONS, "no example configuration was found"


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_example_configuration_loads(path: Path) -> None:
    """Each is named by its recipe."""
    recipe = {"dpo": dpo_loop, "orpo": orpo_loop}[path.stem]
    settings = recipe.Config(**yaml.safe_load(path.read_text()))
    for data in filter(None, (settings.dataset, settings.eval_dataset)):
        assert (EXAMPLES.parent / data).exists()


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
