from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firesteel import store
from firesteel.catalog import ModelEntry

TINY = ModelEntry("tiny-llama", "builtin:tiny-llama")


def firesteel(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "firesteel.cli.main", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home into which the tiny model was fetched."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRESTEEL_HOME", str(path))
        store.fetch(TINY)
    return path


def listed(home: Path, **environment: str) -> dict[str, dict[str, object]]:
    answer = firesteel("models", "list", "--json", FIRESTEEL_HOME=str(home), **environment)
    assert answer.returncode == 0, answer.stderr
    return {row["name"]: row for row in json.loads(answer.stdout)}


def test_help_lists_the_verbs_without_loading_what_is_heavy() -> None:
    code = (
        "import sys; sys.argv = ['firesteel', '--help']\n"
        "heavy = {'torch', 'transformers', 'rich'}\n"
        "from firesteel.cli.main import run\n"
        "try: run()\n"
        "finally: print('loaded:', *sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "models" in answer.stdout
    assert answer.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_version_is_the_packages() -> None:
    import firesteel as package

    assert firesteel("--version").stdout == f"firesteel {package.__version__}\n"


def test_the_list_shows_what_is_here_and_what_is_not(home: Path) -> None:
    answer = firesteel("models", "list", FIRESTEEL_HOME=str(home))
    lines = {line.split()[0]: line for line in answer.stdout.splitlines()}
    assert "builtin:tiny-llama" in lines["tiny-llama"]
    assert "0.4 MB" in lines["tiny-llama"]
    assert str(home / "models") in lines["tiny-llama"]
    assert lines["smollm2-135m-instruct"].endswith("not fetched")


def test_the_list_for_scripts_is_json(home: Path) -> None:
    rows = listed(home)
    folder = Path(str(rows["tiny-llama"]["path"]))
    assert rows["tiny-llama"]["size"] == sum(path.stat().st_size for path in folder.iterdir())
    assert rows["smollm2-135m-instruct"]["status"] == "not fetched"


def test_the_list_goes_on_after_a_model_that_cannot_be_used(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("models:\n  lost: {source: ./gone}\n  circle: {source: circle}\n")
    rows = listed(tmp_path, FIRESTEEL_CATALOG=str(catalog))
    assert rows["lost"]["status"] == "unusable"
    assert "there is no folder" in str(rows["lost"]["problem"])
    assert rows["circle"]["status"] == "unusable"
    assert rows["tiny-llama"]["status"] == "not fetched"


def test_the_list_shows_fetched_models_that_the_catalogue_no_longer_has(home: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("models:\n  tiny-llama: {source: org/another}\n")
    answer = firesteel("models", "list", "--json", FIRESTEEL_HOME=str(home), FIRESTEEL_CATALOG=str(catalog))
    sources = [
        (row["source"], row["status"]) for row in json.loads(answer.stdout) if row["name"] == "tiny-llama"
    ]
    assert sources == [("org/another", "not fetched"), ("builtin:tiny-llama", "ready")]


def test_pull_finds_damage_in_a_model_that_is_here_and_force_mends_it(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    settings = {"FIRESTEEL_HOME": str(tmp_path / "home")}
    (weights,) = (tmp_path / "home").glob("models/*/model.safetensors")
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    damaged = firesteel("models", "pull", "tiny-llama", **settings)
    assert damaged.returncode == 2
    assert "run `firesteel models pull tiny-llama --force`" in damaged.stderr
    assert damaged.stdout == ""
    mended = firesteel("models", "pull", "tiny-llama", "--force", **settings)
    assert mended.stdout == f"{weights.parent}\n"  # the path alone; what happens on the way goes to stderr
    assert "building" in mended.stderr
    assert firesteel("models", "pull", "tiny-llama", **settings).returncode == 0


def test_a_users_mistake_is_one_clean_error_and_exit_code_2(home: Path) -> None:
    answer = firesteel("models", "pull", "tiny-lama", FIRESTEEL_HOME=str(home))
    assert answer.returncode == 2
    assert answer.stderr.startswith("error[model]: model 'tiny-lama' is not in the catalogue")
    assert "Did you mean tiny-llama?" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_an_interrupted_pull_exits_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    folder = tmp_path / "models" / store.where(TINY).name
    folder.parent.mkdir()
    with folder.with_name(f".lock-{folder.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process that is making the model: the pull waits for it
        pull = subprocess.Popen(
            [sys.executable, "-m", "firesteel.cli.main", "models", "pull", "tiny-llama"],
            env={**os.environ, "FIRESTEEL_HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert pull.stderr is not None
        assert pull.stderr.readline().startswith("tiny-llama: waiting for another process")
        pull.send_signal(signal.SIGINT)
        _, errors = pull.communicate()
    assert pull.returncode == 130
    assert errors == ""


def test_rm_asks_says_who_else_means_it_and_how_much_is_freed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text("models:\n  guide/model: {source: tiny-llama}\n")
    settings = {"FIRESTEEL_HOME": str(tmp_path / "home"), "FIRESTEEL_CATALOG": str(catalog)}
    (folder,) = (tmp_path / "home/models").glob("tiny-llama-*")
    partial = folder.with_name(f".partial-{folder.name}-0a1b2c3d")
    partial.mkdir()
    (partial / "half").write_bytes(bytes(10**6))
    left = json.loads(firesteel("models", "list", "--json", **settings).stdout)
    assert [(row["status"], row["size"]) for row in left if row["path"] == str(partial)] == [
        ("left over", 10**6)
    ]
    asked = firesteel("models", "rm", "tiny-llama", **settings)  # nobody answers
    assert (asked.returncode, folder.exists()) == (1, True)
    assert "It is the model of guide/model, too." in asked.stdout + asked.stderr
    size = store.size_on_disk(folder)
    removed = firesteel("models", "rm", "tiny-llama", "--yes", "--json", **settings)
    assert removed.returncode == 0, removed.stderr
    assert json.loads(removed.stdout) == {
        "removed": [str(folder)], "freed": size + 10**6, "kept_elsewhere": 0, "also_named": ["guide/model"],
    }  # fmt: skip
    assert not folder.exists()
    assert not partial.exists()
    again = firesteel("models", "rm", "tiny-llama", "--yes", **settings)
    assert again.returncode == 2
    assert again.stderr.startswith("error[model]: model 'tiny-llama' is not in the store")
