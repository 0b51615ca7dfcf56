"""The main job: a real 135M chat model learns from preferences to answer briefly. Run it with `make demo`.

Exits 1 unless the held-out margin ends above 0 and the held-out accuracy at 0.8 or more.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from firesteel.sdk import UserError
from training.recipes.dpo_loop import Config, main
from training.utils.training_run import RunSummary

REQUIRED_ACCURACY = 0.8


def passed(summary: RunSummary) -> bool:
    """Whether the model has learned the preference on questions that it was not trained on."""
    return summary.after["margin"] > 0 and summary.after["accuracy"] >= REQUIRED_ACCURACY


def show(summary: RunSummary) -> None:
    """The held-out numbers, before and after."""
    rows = (
        ("preference accuracy against the reference", "accuracy", "{:.3f}"),
        ("margin against the reference (nats)", "margin", "{:+.2f}"),
        ("own preference (share with chosen likelier per token)", "policy_preference", "{:.3f}"),
    )
    print(f"\n{'held-out pairs':<54} {'before':>8} {'after':>8}")
    for label, name, form in rows:
        print(f"{label:<54} {form.format(summary.before[name]):>8} {form.format(summary.after[name]):>8}")
    print(
        "Before training, policy and reference are the same model: accuracy and margin are 0 by definition."
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    settings = yaml.safe_load(Path("examples/preferences/dpo.yaml").read_text())
    try:
        result = main(Config(**settings))
    except UserError as error:
        sys.exit(f"error[{error.code}]: {error}")
    show(result)
    if not passed(result):
        sys.exit(f"the demo failed: margin > 0 and accuracy >= {REQUIRED_ACCURACY} were expected")
    print(
        f"\nLearned. The adapter is in {result.export_path}; metrics are in {settings['log_path']}/metrics.jsonl."
    )
