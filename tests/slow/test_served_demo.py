"""The demo's run against a server: the real model, and the bits that it has with a trainer in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from processes import free_port, run, served
from runs import outcome

from firesteel.store import home
from training.recipes.dpo_loop import Config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def settings(folder: Path) -> Config:
    """The demo's, on fewer pairs."""
    demo = yaml.safe_load((ROOT / "examples/preferences/dpo.yaml").read_text())
    paths = {name: str(ROOT / demo[name]) for name in ("dataset", "eval_dataset")}
    folder.mkdir()
    rows = Path(paths["eval_dataset"]).read_text().splitlines(keepends=True)[:6]
    (folder / "heldout.jsonl").write_text("".join(rows))
    paths |= {"eval_dataset": str(folder / "heldout.jsonl"), "log_path": str(folder / "run")}
    return Config(**{**demo, **paths, "max_pairs": 16, "sample_max_tokens": 16})


def set_cache_aside(folder: Path) -> None:
    """The next run asks its reference itself: what is cached may have been computed with other rows beside it."""
    folder.mkdir()
    for path in home().glob("reference_cache.sqlite*"):
        path.rename(folder / path.name)


def test_the_demo_against_a_server_has_the_numbers_of_the_demo_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = settings(tmp_path / "here"), settings(tmp_path / "there")
    set_cache_aside(tmp_path / "earlier")
    status, said = run(here)
    assert status == 0, said
    set_cache_aside(tmp_path / "here's")
    port = free_port()
    monkeypatch.setenv("FIRESTEEL_BASE_URL", f"http://127.0.0.1:{port}")
    with served(tmp_path / "served", port, "smollm2-135m-instruct"):
        status, said = run(there)
    assert status == 0, said
    assert "0 from the cache" in said
    assert outcome(there) == outcome(here)
