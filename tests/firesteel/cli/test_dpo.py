"""`firesteel dpo` as a user runs it: a process, files, exit codes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml


def firesteel(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "firesteel.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run of two steps on tiny-llama."""
    row = {"prompt": "Question? ", "chosen": "yes", "rejected": "no"}
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({**row, "prompt": f"Question {i}? "}) + "\n" for i in range(4)))
    settings = {
        "log_path": str(tmp_path / "run"),
        "base_model": "tiny-llama",
        "dataset": str(data),
        "lora_rank": 2,
        "batch_size": 2,
        "lr_scheduler": {"type": "cosine", "warmup_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_flag_wins_over_set_which_wins_over_the_file(config_file: Path) -> None:
    ran = firesteel(
        "dpo", str(config_file), "--set", "beta=0.2", "--set", "epochs=3", "--set", "lr_scheduler.warmup_steps=2",
        "--epochs", "2", "--lr-scheduler.min-lr-ratio", "0.5", "--learning-rate", "1e-4",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    used = json.loads((config_file.parent / "run/config.json").read_text())
    assert (used["beta"], used["epochs"], used["batch_size"], used["learning_rate"]) == (0.2, 2, 2, 1e-4)
    assert used["lr_scheduler"]["type"] == "cosine"
    assert (used["lr_scheduler"]["warmup_steps"], used["lr_scheduler"]["min_lr_ratio"]) == (2, 0.5)
    assert "step 4/4" in ran.stdout
    assert (config_file.parent / "run/adapter/adapter_config.json").exists()


def test_all_settings_may_be_flags(config_file: Path) -> None:
    folder = config_file.parent
    ran = firesteel(
        "dpo", "--log-path", str(folder / "other"), "--base-model", "tiny-llama", "--dataset",
        str(folder / "pairs.jsonl"), "--sample-prompts", "['Hello?', 'Well, well']", "--sample-max-tokens", "3",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len((folder / "other/samples.jsonl").read_text().splitlines()) == 2


def test_one_prompt_is_given_as_it_stands(config_file: Path) -> None:
    ran = firesteel("dpo", str(config_file), "--sample-prompts", "Well, you?", "--sample-max-tokens", "3")
    assert ran.returncode == 0, ran.stderr
    asked = [json.loads(line)["prompt"] for line in (config_file.parent / "run/samples.jsonl").open()]
    assert asked == ["Well, you?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "betta=1"], "error[config]: betta: Config has no such setting"),
        (["--set", "beta"], "error[config]: --set beta: expected key=value"),
        (["--beta", "-1"], "error[config]: beta: Input should be greater than 0 (got '-1')"),
        (["--dataset", "missing.jsonl"], "error[data]: missing.jsonl"),
        (["--base-model", "nobody"], "error[model]: "),
        (
            ["--fresh", "--resume-from", "step-3"],
            "error[config]: --fresh, --resume-from and --resume are one",
        ),
        (["--resume-from", "step-3"], "error[checkpoint]: resume: step-3: "),
        (["--keep-last", "3"], "error[config]: "),
    ],
    ids=[
        "unknown",
        "no value",
        "out of range",
        "no data",
        "no model",
        "contradiction",
        "no checkpoint",
        "keeps nothing",
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    config_file: Path, arguments: list[str], message: str
) -> None:
    ran = firesteel("dpo", str(config_file), *arguments)
    assert (ran.returncode, ran.stderr.startswith(message)) == (2, True), ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_bad_row_is_named_by_file_and_line(config_file: Path) -> None:
    data = config_file.parent / "pairs.jsonl"
    data.write_text(data.read_text() + '{"prompt": "x", "chosen": "", "rejected": "n"}\n')
    ran = firesteel("dpo", str(config_file))
    assert ran.returncode == 2
    assert f"{data}:5: chosen" in ran.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("beta: 0.1\nepochs: 2\nbeta: 0.2", "'beta' is there twice"),
        ("lr_scheduler: {type: cosine, type: linear}", "'type' is there twice"),
        ("1: 2", "1 is no text; put a key in quotes"),
        ("on: 2", "on is no text; put a key in quotes"),
        ("[a, b]: 2", "this is no text; put a key in quotes"),
        ("- a\n- b", "expected settings as `name: value`, found list"),
        ("", "expected settings as `name: value`, found NoneType"),
        (b"log_path: caf\xe9", "is not UTF-8"),
        (None, "No such file"),
    ],
    ids=[
        "broken",
        "twice",
        "twice inside",
        "a number",
        "a switch",
        "a list as key",
        "a list",
        "empty",
        "not UTF-8",
        "missing",
    ],
)
def test_a_config_file_that_is_none_is_refused(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = firesteel("dpo", str(path))
    assert ran.returncode == 2
    assert ran.stderr.startswith("error[config]: ")
    assert message in ran.stderr


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "renamed.txt"])
def test_data_in_place_of_the_settings_is_told_where_it_belongs(config_file: Path, name: str) -> None:
    rows = (config_file.parent / "pairs.jsonl").read_bytes()
    file = config_file.parent / name
    file.write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    ran = firesteel("dpo", str(file))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error[config]: {file}: looks like data")
    assert f"`--dataset {file}`" in ran.stderr


def test_settings_may_be_json_in_one_line(config_file: Path) -> None:
    config_file.write_text(json.dumps(yaml.safe_load(config_file.read_text())))
    assert firesteel("dpo", str(config_file)).returncode == 0


def test_a_setting_of_another_recipe_is_told_with_the_command_that_has_it(config_file: Path) -> None:
    ran = firesteel("dpo", str(config_file), "--set", "orpo_lambda=0.2", "--set", "max_examples=3")
    assert ran.returncode == 2
    assert "orpo_lambda: Config has no such setting" in ran.stderr
    assert "orpo_lambda is a setting of orpo: `firesteel orpo`" in ran.stderr
    assert "max_examples is a setting of sft: `firesteel sft`" in ran.stderr
    misspelt = firesteel("dpo", str(config_file), "--set", "betta=1")
    assert misspelt.stderr == "error[config]: betta: Config has no such setting\n"


def test_data_that_is_not_there_is_told_with_the_folder_that_it_was_looked_for_from(
    config_file: Path,
) -> None:
    ran = firesteel("dpo", str(config_file), "--dataset", "examples/none.jsonl")
    assert ran.stderr == (
        f"error[data]: examples/none.jsonl: there is no such file; it was looked for from the folder {os.getcwd()}\n"
    )


def test_a_name_given_whole_is_not_dropped_for_a_setting_inside_it(config_file: Path) -> None:
    settings = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump({**settings, "lr_scheduler": "cosine"}))
    ran = firesteel("dpo", str(config_file), "--lr-scheduler.warmup-steps", "1")
    assert ran.returncode == 2
    assert ran.stderr.startswith(
        "error[config]: lr_scheduler.warmup_steps: lr_scheduler is given as 'cosine'"
    )


def test_a_run_ends_well_where_the_output_lacks_a_letter(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ran = firesteel("dpo", str(config_file), "--eval-fraction", "0.3")
    assert ran.returncode == 0, ran.stderr
    assert "\\u0394logp" in ran.stdout


def test_help_answers_at_once_and_lists_every_setting() -> None:
    from training.recipes.dpo_loop import Config

    seconds, at_least = [], []
    for _ in range(5):
        started = time.monotonic()
        ran = firesteel("dpo", "--help")
        seconds.append(time.monotonic() - started)
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "import asyncio, numpy, pydantic, typer"], check=True)
        at_least.append(time.monotonic() - started)
    assert all(f"--{name.replace('_', '-')}" in ran.stdout for name in Config.model_fields)
    # On a slow machine the libraries alone take half a second; in pairs, since it is not as fast at all times.
    assert min(seconds) < 0.5 or min(a / b for a, b in zip(seconds, at_least, strict=True)) < 2.5


def test_yes_or_no_is_a_switch(config_file: Path) -> None:
    ran = firesteel("dpo", str(config_file), "--verify", "--no-shuffle")
    assert ran.returncode == 0, ran.stderr
    used = json.loads((config_file.parent / "run/config.json").read_text())
    assert (used["verify"], used["shuffle"]) == (True, False)
    assert ran.stdout.count("verify  ") == 4
    assert "DIFFERS" not in ran.stdout


def test_help_loads_no_model_code() -> None:
    script = (
        "import sys; sys.argv = ['firesteel', 'dpo', '--help']\n"
        "from firesteel.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "print('loaded:', sorted({'torch', 'transformers', 'peft', 'rich'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("loaded: []\n")


def test_a_fast_path_that_differs_is_one_line_and_exit_code_1(config_file: Path) -> None:
    script = (
        "import sys; sys.argv = ['firesteel', 'dpo', sys.argv[1], '--verify']\n"
        "from firesteel.engine import attention\n"
        "right = attention._by_segments\n"
        "attention._by_segments = lambda *given: right(*given) * 1.0002\n"
        "from firesteel.cli.main import run\nrun()\n"
    )
    command = [sys.executable, "-c", script, str(config_file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error[verification]: the fast path does not give the numbers"), ran.stderr
    assert "DIFFERS" in ran.stdout
