"""What is installed, and what is read of the environment."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import firesteel
from firesteel import installation


def test_every_variable_of_ours_that_the_source_reads_is_known() -> None:
    read: set[str] = set()
    for top in ("firesteel", "training"):
        for file in (Path(firesteel.__file__).parents[1] / top).rglob("*.py"):
            read |= set(re.findall(r'"((?:FIRESTEEL|FIREWORKS)_[A-Z_]+)"', file.read_text(encoding="utf-8")))
    assert read == {name for name in installation.VARIABLES if name.startswith(("FIRESTEEL_", "FIREWORKS_"))}


def test_keys_are_shown_by_their_length_only() -> None:
    variables = {
        "FIRESTEEL_API_KEY": "fs-secret",
        "HF_TOKEN": "hf-secret",
        "FIRESTEEL_BASE_URL": "https://me:secret@there:8350/x",
        "FIRESTEEL_HOEM": "secret",
    }
    found = {finding.subject: finding for finding in installation.environment(variables)}
    assert "secret" not in str(found)
    assert found["FIRESTEEL_API_KEY"].says.startswith("set, 9 characters")
    assert found["FIRESTEEL_BASE_URL"].says.startswith("https://…@there:8350/x ")
    assert (found["FIRESTEEL_HOEM"].verdict, found["FIRESTEEL_HOEM"].says) == (
        "note",
        "is read by nothing here",
    )


def test_what_matters_is_named_with_its_version_and_the_one_that_was_tested() -> None:
    found = {f.subject: f for f in installation.findings() if f.section == "packages"}
    assert found["torch"].values["installed"] == version("torch")
    assert found["torch"].values["tested"]
    assert [finding for finding in found.values() if finding.verdict == "problem"] == []


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch) -> None:
    there = installation.importlib.metadata.version

    def without_wandb(name: str) -> str:
        if name in ("wandb", "peft"):
            raise installation.importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "numpy" else there(name)

    monkeypatch.setattr(installation.importlib.metadata, "version", without_wandb)
    found = {(f.section, f.subject): f for f in installation.findings()}
    assert found["extras", "wandb"].todo == "pip install 'firesteel[wandb]'"
    assert found["extras", "wandb"].verdict == "note"
    assert found["packages", "peft"].verdict == "problem"
    assert found["packages", "numpy"].says == "0.0.1; numpy>=2 is needed"
