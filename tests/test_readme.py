"""What the README shows is run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_in_the_readme_starts_at_ln_2_and_falls(capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "firesteel.connect" in b]
    exec(compile(loop, "README.md", "exec"), {})
    losses = [float(value) for value in re.findall(r"'loss:sum': ([0-9.]+)", capsys.readouterr().out)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2


def test_the_run_in_the_readme_gives_an_adapter_that_loads_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (ROOT / "examples/preferences/train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows[:20]), encoding="utf-8")
    # The same commands on a model that needs no fetching.
    (tmp_path / "catalog.yaml").write_text("models: {smollm2-135m-instruct: {source: tiny-llama}}")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "catalog.yaml"))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    for block in (b for b in blocks if "runs/mine" in b):
        exec(compile(block, "README.md", "exec"), names)
    assert names["summary"].export_path == "runs/mine/adapter"
    prompt = names["tokenizer"]("Hello", return_tensors="pt")
    assert names["model"](**prompt).logits.shape[-1] >= len(names["tokenizer"])


def test_the_catalogue_in_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from firesteel.catalog import load_catalog

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "catalog.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "catalog.yaml"))
    catalog = load_catalog()
    assert catalog.resolve_model("Qwen/Qwen3-8B").name == "smollm2-135m-instruct"
    assert catalog.shape("accounts/fireworks/trainingShapes/qwen3-8b-128k-h200").device == "cpu"


def test_every_file_that_the_documents_link_to_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
