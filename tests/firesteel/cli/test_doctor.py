"""`firesteel doctor` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import config
from typer.testing import CliRunner

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.cli.main import app
from transports import service_in, serving


@pytest.fixture(autouse=True, scope="module")
def _model() -> None:
    store.fetch(load_catalog().resolve_model("tiny-llama"))


def doctor(*arguments: object) -> tuple[int, str]:
    """Exit code, and what it prints."""
    given = ["doctor", *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    return result.exit_code, result.stdout


def in_json(*arguments: object) -> tuple[int, dict[tuple[str, str], dict[str, Any]]]:
    code, printed = doctor(*arguments, "--json")
    content = json.loads(printed)
    assert content["fine"] == (code == 0)
    return code, {(finding["section"], finding["subject"]): finding for finding in content["findings"]}


def config_file(folder: Path, **settings: Any) -> Path:
    values = {**config(folder).model_dump(exclude_unset=True), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def test_a_machine_that_can_train_is_fine(tmp_path: Path) -> None:
    code, printed = doctor(config_file(tmp_path))
    assert code == 0, printed
    assert printed.endswith("nothing here would stop a run\n")
    code, found = in_json(config_file(tmp_path))
    assert found["machine", "memory"]["values"]["free"] > 2**28
    assert found["devices", "used"]["values"]["kinds"] == ["cpu"]
    assert found["needs", "memory"]["values"]["most"] > 6 * 10**8
    assert found["models", "tiny-llama"]["values"]["bytes"] > 10**5
    assert "FIRESTEEL_HOME" in found["environment", "FIRESTEEL_HOME"]["subject"]


def test_without_a_config_it_looks_at_the_machine_alone() -> None:
    code, found = in_json()
    assert code == 0
    assert {section for section, _ in found} == {
        "machine", "packages", "extras", "environment", "models", "caches", "devices",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "subject", "says"),
    [
        ({"betta": 1}, "config.yaml", "betta: Config has no such setting"),
        ({"dataset": "none.jsonl"}, "dataset", "none.jsonl"),
        ({"base_model": "nobody"}, "model", "model 'nobody' is not in the catalogue"),
        (
            {"max_seq_len": 10**6, "trainer": {"training_shape_id": "x"}},
            "trainer",
            "training shape 'x' is not in",
        ),
    ],
    ids=["a setting", "data", "a model", "a shape"],
)
def test_what_would_stop_a_run_is_a_problem_and_exit_code_2(
    tmp_path: Path, settings: dict[str, Any], subject: str, says: str
) -> None:
    file = config_file(tmp_path, **settings)
    code, found = in_json(file)
    problems = {
        Path(name).name: finding["says"]
        for (_, name), finding in found.items()
        if finding["verdict"] == "problem"
    }
    assert code == 2
    assert says in problems[subject]
    code, printed = doctor(file)
    assert code == 2
    assert f"!!  {subject}" in printed or f"{subject}: " in printed


def test_a_catalogue_that_cannot_be_read_is_a_problem_without_a_config_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_json()[1]["models", "catalogue"]["verdict"] == "ok"
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "nope"))
    code, found = in_json()
    assert (code, found["models", "catalogue"]["verdict"]) == (2, "problem")
    assert "there is no such file; FIRESTEEL_CATALOG" in found["models", "catalogue"]["says"]
    (tmp_path / "mine.yaml").write_text("models:\n  mine: {source: tiny-llama}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in in_json()[1]["models", "catalogue"]["says"]


def test_the_recipe_decides_which_settings_there_are(tmp_path: Path) -> None:
    file = config_file(tmp_path, orpo_lambda=0.2)
    code, printed = doctor(file)
    assert code == 2
    assert "orpo_lambda is a setting of orpo: give --recipe orpo" in printed
    assert doctor(file, "--recipe", "orpo")[0] == 0
    (tmp_path / "chats.jsonl").write_text('{"prompt": "Question?", "completion": "Answer."}\n')
    file = config_file(tmp_path, dataset=str(tmp_path / "chats.jsonl"), max_examples=1)
    assert doctor(file)[0] == 2
    assert doctor(file, "--recipe", "sft")[0] == 0


def test_the_recipe_decides_what_rows_are_usable(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"prompt": "Question?", "completion": "Answer."}\n')
    file = config_file(tmp_path, dataset=str(tmp_path / "chats.jsonl"))
    code, found = in_json(file)
    assert (code, found["config", "dataset"]["verdict"]) == (2, "problem")
    assert "`firesteel sft` trains on these" in found["config", "dataset"]["says"]
    assert doctor(file, "--recipe", "sft")[0] == 0


def test_a_server_is_asked_and_one_that_is_not_there_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service_in(tmp_path / "service", "tiny-llama") as service, serving(service) as server:
        monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
        code, found = in_json()
        assert (code, found["server", server.url]["says"]) == (2, "it asks for a key")
        monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
        code, printed = doctor(config_file(tmp_path))
        assert code == 0, printed
        assert server.key not in printed
        assert "at the server: memory and shapes are those there" in printed
    code, found = in_json()
    assert code == 2
    assert found["server", server.url]["says"].startswith("cannot be reached")


def test_the_guides_variables_name_a_server_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIREWORKS_BASE_URL", "http://127.0.0.1:9")
    code, found = in_json()
    assert code == 2
    assert found["server", "http://127.0.0.1:9"]["says"].startswith("cannot be reached")
    monkeypatch.setenv("FIRESTEEL_BASE_URL", "local")
    assert in_json()[0] == 0


def test_a_device_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRESTEEL_DEVICE", "abacus")
    code, found = in_json()
    assert (code, found["devices", "FIRESTEEL_DEVICE"]["verdict"]) == (2, "problem")


def test_what_needs_no_torch_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from firesteel.cli.doctor import _findings\n"
        "for finding in _findings(Path(sys.argv[1]), 'dpo'):\n"
        "    print(finding.section, *sorted({'torch', 'transformers'} & set(sys.modules)), sep=' ')\n"
    )
    command = [sys.executable, "-c", code, str(config_file(tmp_path))]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert [line for line in lines if "transformers" in line] == []
    without = {line for line in lines if "torch" not in line}
    assert without == {"machine", "packages", "extras", "environment", "models", "caches", "config"}


def test_no_heading_stands_twice(tmp_path: Path) -> None:
    headings = [line for line in doctor(config_file(tmp_path))[1].splitlines() if line[:1].isalpha()]
    assert headings[-3:] == ["devices", "needs", "nothing here would stop a run"]
    assert len(set(headings)) == len(headings)
