"""`firesteel data check|convert|preview`, as they are called."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import config, write_lists, write_rows
from typer.testing import CliRunner, Result

from firesteel.cli.main import app
from firesteel.sdk import ConfigError, DataError
from training.recipes import dpo_loop, sft_loop
from training.utils import preference_data, sft_data
from training.utils.data_estimate import count_evaluations, count_kept


def firesteel(*arguments: object, **environment: str) -> Result:
    """What it does; its errors are raised."""
    told = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["data", *told], catch_exceptions=False, env=environment)


# check


def test_a_good_file_is_said_to_be_good(tmp_path: Path) -> None:
    result = firesteel("check", write_rows(tmp_path / "pairs.jsonl", 8), "--model", "tiny-llama")
    assert result.exit_code == 0
    assert "8 rows of the form prompt-messages: 8 pairs" in result.stdout
    assert result.stdout.rstrip().endswith("errors: 0, warnings: 0")


def test_without_a_model_it_says_what_was_not_checked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 8)
    assert "Without --model only what needs no tokens was checked" in firesteel("check", path).stdout
    with pytest.raises(ConfigError, match=r"--max-seq-len counts tokens.*give --model"):
        firesteel("check", path, "--max-seq-len", 100)


LONGEST = 8192
"""Tokens that tiny-llama takes, as its config.json says."""


def write_with_a_long_row(path: Path) -> str:
    """Four pairs, of which the second does not fit into tiny-llama."""
    write_rows(path, 3)
    answers = {
        side: [{"role": "assistant", "content": text * LONGEST}]
        for side, text in (("chosen", "a"), ("rejected", "b"))
    }
    first, *others = path.read_text().splitlines()
    row = {"prompt": [{"role": "user", "content": "Go on."}], **answers}
    path.write_text("\n".join([first, json.dumps(row), *others]) + "\n")
    return str(path)


def test_a_check_drops_what_a_run_on_that_model_drops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_with_a_long_row(tmp_path / "long.jsonl")
    printed = firesteel("check", path, "--model", "tiny-llama").stdout
    assert printed.startswith(
        f"longest row: {LONGEST:,} tokens, what tiny-llama takes; --max-seq-len sets another\n"
    )
    assert "line 2: dropped: chosen has 8,2" in printed
    run = config(tmp_path).model_copy(update={"dataset": path})
    dpo_loop.main(run)
    (summary,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{path}: 4 rows"))
    assert "1 dropped" in summary
    assert summary.partition(" (listed")[0] in printed.splitlines()


def test_a_preview_drops_it_too(tmp_path: Path) -> None:
    path = write_with_a_long_row(tmp_path / "pairs.jsonl")
    arguments = ("preview", path, "--model", "tiny-llama", "--rows", 2)
    shown = firesteel(*arguments)
    assert "pairs.jsonl:2: max_seq_len: dropped: chosen has 8,2" in shown.stdout
    limit = f"longest row: {LONGEST:,} tokens, what tiny-llama takes"
    assert shown.stdout.splitlines()[-1].startswith(limit)
    as_json = firesteel(*arguments, "--json")
    assert [row["problem"] == "" for row in json.loads(as_json.stdout)] == [True, False, True]
    assert as_json.stderr.startswith(limit)


def test_another_limit_can_be_set(tmp_path: Path) -> None:
    path = write_with_a_long_row(tmp_path / "pairs.jsonl")
    longer = firesteel("check", path, "--model", "tiny-llama", "--max-seq-len", 9999)
    assert "longest row: 9,999 tokens, by --max-seq-len\n" in longer.stdout
    assert "4 rows of the form prompt-messages: 4 pairs\n" in longer.stdout


def test_the_limit_of_a_run_to_estimate_is_its_own(tmp_path: Path) -> None:
    path, said = (
        write_rows(tmp_path / "pairs.jsonl", 4),
        ("by max_seq_len of the run", "what the trainer of the run takes"),
    )
    for limit, says in zip((300, LONGEST), said, strict=True):
        given = {} if limit == LONGEST else {"max_seq_len": limit}
        # A row that is refused ends it before anything is tried out.
        bad = tmp_path / "bad.jsonl"
        bad.write_text(Path(path).read_text() + "{}\n")
        report = json.loads(
            firesteel("check", bad, "--estimate", settings(tmp_path, **given), "--json").stdout
        )
        assert (report["max_seq_len"], report["max_seq_len_is"]) == (limit, says)


UNKNOWN_SHAPES = """
shapes:
  accounts/local/trainingShapes/cpu-policy:
    {base_model: another, mode: POLICY_TRAINER, device: cpu, dtype: float32}
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        (("--tokenizer", "tiny-llama"), {}, "a tokenizer alone has none"),
        (
            ("--tokenizer", "tiny-llama", "--model", "smollm2-135m-instruct"),
            {"FIRESTEEL_HOME": "home"},
            "smollm2-135m-instruct is not here (`firesteel models pull smollm2-135m-instruct`)",
        ),
        (
            ("--model", "tiny-llama"),
            {"FIRESTEEL_BASE_URL": "http://127.0.0.1:1"},
            "it is that of a trainer at a server, which is not asked here",
        ),
        (
            ("--model", "tiny-llama"),
            {"FIRESTEEL_CATALOG": "catalog.yaml"},
            "no training shape runs 'tiny-llama' as POLICY_TRAINER",
        ),
    ],
    ids=["of a tokenizer", "of a model that is not here", "of a server", "where no trainer runs it"],
)
def test_where_no_limit_is_known_that_is_said(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], why: str
) -> None:
    (tmp_path / "catalog.yaml").write_text(UNKNOWN_SHAPES)
    paths = {"home": str(tmp_path / "home"), "catalog.yaml": str(tmp_path / "catalog.yaml")}
    environment = {name: paths.get(value, value) for name, value in environment.items()}
    path = write_with_a_long_row(tmp_path / "pairs.jsonl")
    printed = firesteel("check", path, *arguments, **environment).stdout
    assert printed.startswith(f"longest row: no limit was checked: {why}")
    assert "; --max-seq-len sets one\n" in printed
    assert "4 rows of the form prompt-messages: 4 pairs\n" in printed


def test_warnings_are_errors_if_that_is_asked_for(tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "pairs.jsonl", 8))
    path.write_text(path.read_text() * 2)
    assert firesteel("check", path).exit_code == 0
    assert firesteel("check", path, "--strict").exit_code == 2


def test_several_files_are_checked_and_one_held_out(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", 4, start) for name, start in (("a", 0), ("b", 4))]
    heldout = write_rows(tmp_path / "heldout.jsonl", 4, 6)
    report = json.loads(firesteel("check", *files, "--heldout", heldout, "--json").stdout)
    assert [Path(file["path"]).name for file in report["files"]] == ["a.jsonl", "b.jsonl", "heldout.jsonl"]
    assert [finding["lines"] for finding in report["files"][2]["findings"]] == [[1, 2], [1, 2]]


def test_several_files_are_compared(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", 4, start) for name, start in (("a", 0), ("b", 3))]
    told = f"1 row stands in {files[0]} too, token for token"
    printed = firesteel("check", *files).stdout
    assert f"warning[duplicates-across-files]: {told} (line 1; there 4)\n" in printed
    assert "Files were compared too" in printed
    assert printed.rstrip().endswith("errors: 0, warnings: 1")
    assert "Files were compared" not in firesteel("check", files[0], "--heldout", files[1]).stdout
    assert firesteel("check", *files, "--strict").exit_code == 2
    report = json.loads(firesteel("check", *files, "--json").stdout)
    assert [file["findings"] for file in report["files"]] == [
        [],
        [
            {
                "level": "warning",
                "name": "duplicates-across-files",
                "text": told,
                "rows": 1,
                "lines": [1],
                "counterparts": [{"line": 1, "path": files[0], "other_line": 4}],
            }
        ],
    ]


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 3)
    result = firesteel("check", write_rows(tmp_path / "pairs.jsonl", 4), chats)
    assert result.exit_code == 2
    assert (
        f"error[another-kind]: {chats}: holds supervised rows, but is checked as preferences" in result.stdout
    )
    assert result.stdout.count("chats.jsonl") == 2


def test_a_check_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no FILE is given"):
        firesteel("check")


# estimate


def settings(tmp_path: Path, **values: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"base_model": "tiny-llama", "log_path": str(tmp_path / "run"), **values}))
    return path


def test_an_estimate_knows_the_steps_tokens_and_disk_of_the_run(tmp_path: Path) -> None:
    """Of times only that they are there: they are compared with real runs by whoever has a machine alone."""
    run = config(tmp_path, 12, batch_size=3, epochs=2, eval_fraction=0.2, dcp_save_interval=2, keep_last=2)
    values = run.model_dump(mode="json", exclude_unset=True)
    report = json.loads(firesteel("check", "--estimate", settings(tmp_path, **values), "--json").stdout)
    estimate = report["estimate"]
    dpo_loop.main(run)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/computed_tokens" in line]
    assert estimate["steps_per_epoch"] * estimate["epochs"] == len(steps)
    tokens = sum(line["train/computed_tokens"] for line in steps)
    assert 0.9 < estimate["computed_tokens_per_epoch"] * 2 / tokens < 1.1
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    told = estimate["disk_total_bytes"] - estimate["disk_caches_bytes"]
    assert 0.75 < told / written < 1.25
    positive = ("seconds_per_epoch", "seconds_reference", "seconds_evaluations", "seconds_loading")
    assert all(estimate[name] > 0 for name in positive)
    assert estimate["seconds_total"] > 2 * estimate["seconds_per_epoch"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"eval_interval": 2},
        {"eval_interval": 3, "dcp_save_interval": 2},
        {"eval_interval": 4, "dcp_save_interval": 2, "keep_last": 2},
        {"dcp_save_interval": 1, "keep_last": 1, "keep_every": 3},
        {"eval_interval": 1, "dcp_save_interval": 1, "keep_last": 1, "keep_best": "dpo_loss", "learning_rate": 10.0},
    ],
    ids=["neither", "evaluated", "saved", "the last two", "every third", "the best, which is not the last"],
)  # fmt: skip
def test_evaluations_and_checkpoints_are_counted_as_a_run_makes_them(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    run = config(tmp_path, 10, eval_fraction=0.2, **given)  # 4 steps
    steps = dpo_loop.main(run).steps
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert count_evaluations(run, steps) == sum("eval/dpo_loss" in line for line in lines)
    assert count_kept(run, steps) == len(list((tmp_path / "run").glob("checkpoints/step-*")))


def test_an_estimate_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    path = write_rows(tmp_path / "pairs.jsonl", 8)
    result = firesteel("check", path, "--estimate", settings(tmp_path, lora_rank=2), "--set", "epochs=3")
    assert result.exit_code == 0
    assert "epochs: 3" in result.stdout
    assert not (tmp_path / "run").exists()
    left = {file.name for file in (tmp_path / "home").iterdir()}
    assert "reference_cache.sqlite" not in left
    assert not [name for name in left if name.startswith("estimate-")]


def test_supervised_runs_are_estimated_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("check", path, "--recipe", "sft", "--estimate", settings(tmp_path), "--json")
    estimate = json.loads(firesteel(*arguments).stdout)["estimate"]
    assert (estimate["rows"], estimate["seconds_reference"]) == (10, 0)
    assert sft_loop.Config.recipe == "sft"


def test_an_estimate_counts_all_of_the_rows_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORPO has no reference, and so no other cache. The files have each a head, of 128 bytes."""
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    path = write_lists(tmp_path / "lists.jsonl", 12)
    arguments = ("check", path, "--recipe", "orpo", "--estimate", settings(tmp_path, batch_size=4), "--json")
    estimate = json.loads(firesteel(*arguments).stdout)["estimate"]
    (folder,) = (tmp_path / "home/row_indexes").iterdir()
    arrays = [np.load(folder / name) for name in ("rows.npy", "ranked.npy")]
    assert [len(array) for array in arrays] == [12, 36]
    assert estimate["disk_caches_bytes"] == sum(array.nbytes for array in arrays)


def test_what_a_run_would_refuse_is_not_estimated(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(Path(write_rows(tmp_path / "good.jsonl", 4)).read_text() + "{}\n")
    result = firesteel("check", path, "--estimate", settings(tmp_path), "--json")
    assert (result.exit_code, json.loads(result.stdout)["estimate"]) == (2, None)


def test_settings_of_another_recipe_are_told_with_the_option_that_names_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 4)
    with pytest.raises(ConfigError, match="orpo_lambda is a setting of orpo: give --recipe orpo"):
        firesteel("check", path, "--estimate", settings(tmp_path, orpo_lambda=0.5))
    with pytest.raises(ConfigError, match=r"pairs\.jsonl: looks like data, and settings are expected"):
        firesteel("check", "--estimate", path)


def test_a_run_has_its_own_limits(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 4)
    with pytest.raises(ConfigError, match="model and limits are the run's own: use --set"):
        firesteel("check", path, "--estimate", settings(tmp_path), "--max-seq-len", 99)
    with pytest.raises(ConfigError, match="one FILE"):
        firesteel("check", path, path, "--estimate", settings(tmp_path))


# convert


def test_rows_are_converted_to_standard_output_or_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 3)
    printed = firesteel("convert", path, "--to", "samples")
    firesteel("convert", path, "--to", "samples", "--out", tmp_path / "out.jsonl")
    assert printed.stdout == (tmp_path / "out.jsonl").read_text()
    assert "3 rows converted, 0 left out" in printed.stderr
    assert [len(json.loads(line)["samples"]) for line in printed.stdout.splitlines()] == [2, 2, 2]


def test_the_chosen_side_of_preferences_becomes_rows_for_sft(tmp_path: Path) -> None:
    path, out = write_rows(tmp_path / "pairs.jsonl", 3), tmp_path / "chosen.jsonl"
    result = firesteel("convert", path, "--side", "chosen", "--to", "completion", "--out", out)
    assert result.stderr == "3 rows converted, 0 left out\n"
    assert json.loads(out.read_text().splitlines()[0])["completion"] == [
        {"role": "assistant", "content": "yes 0"}
    ]
    assert "3 rows of the form completion: 3 examples" in firesteel("check", out).stdout


def test_it_says_that_of_whole_texts_more_is_learned_than_is_scored_in_the_pair(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"chosen": "1+1=2", "rejected": "1+1=3"}))
    result = firesteel("convert", path, "--side", "chosen", "--to", "text")
    assert result.stdout == '{"text": "1+1=2"}\n'
    assert "of whole texts all is learned, with what the two sides share" in result.stderr


def test_the_help_of_convert_names_every_form() -> None:
    forms = "".join(firesteel("convert", "--help").stdout.split())
    assert all(form.name in forms for form in (*preference_data.FORMATS, *sft_data.FORMATS))


# preview


def test_a_preview_shows_prompt_and_sides_with_marks_where_there_is_no_colour(tmp_path: Path) -> None:
    result = firesteel(
        "preview", write_rows(tmp_path / "pairs.jsonl", 5), "--model", "tiny-llama", "--rows", 2
    )
    assert result.stdout.count("<|im_start|>user↵\nQuestion 0?<|im_end|>↵\n<|im_start|>assistant↵\n") == 1
    assert "chosen, 6 tokens, 6 scored: ⟦yes 0<|im_end|>⟧" in result.stdout
    assert "⟦nope 1<|im_end|>⟧" in result.stdout
    assert "Question 2?" not in result.stdout
    assert "\x1b" not in result.stdout


COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}


def test_a_preview_has_colours_on_a_terminal_unless_they_are_not_wanted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 1)
    arguments = ("preview", path, "--model", "tiny-llama")
    coloured = firesteel(*arguments, **COLOURS).stdout
    assert "\x1b[1;32my\x1b[0m\x1b[1;4;32me" in coloured
    assert "⟦" not in coloured
    plain = firesteel(*arguments, **COLOURS, NO_COLOR="1").stdout
    assert "⟦yes 0<|im_end|>⟧" in plain
    assert "\x1b" not in plain


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def write_emoji(tmp_path: Path) -> str:
    path = tmp_path / "emoji.jsonl"
    row = {"prompt": "smile: ", "chosen": "a 😀 b\n\n你  ", "rejected": "[b]none[/b]"}
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_the_text_of_a_preview_is_the_same_in_colours_and_without(tmp_path: Path) -> None:
    arguments = ("preview", write_emoji(tmp_path), "--model", "tiny-llama", "--rows", 1)
    plain = firesteel(*arguments).stdout.splitlines()
    for columns in ("30", "200"):
        coloured = without_colours(firesteel(*arguments, **COLOURS, COLUMNS=columns).stdout).splitlines()
        assert coloured[1:] == [line.replace("⟦", "").replace("⟧", "") for line in plain[1:]]
    assert "chosen, 16 tokens, 16 scored, 7 only parts of a character: a 😀 b↵" in "\n".join(coloured)


def test_every_second_token_is_underlined(tmp_path: Path) -> None:
    arguments = ("preview", write_emoji(tmp_path), "--model", "tiny-llama")
    (row,) = json.loads(firesteel(*arguments, "--json").stdout)
    chosen = row["parts"][1]["tokens"]
    texts = [token["text"] for token in chosen if not token["unfinished"]]
    coloured = firesteel(*arguments, **COLOURS).stdout
    shown = re.findall(r"\x1b\[1;(4;)?32m([^\x1b]*)\x1b", coloured)
    assert [text for _, text in shown] == [text.replace("\n", "↵") for text in texts]
    assert [bool(underlined) for underlined, _ in shown] == [place % 2 == 1 for place in range(len(texts))]


def test_borders_stand_between_tokens_where_they_are_asked_for(tmp_path: Path) -> None:
    arguments = ("preview", write_emoji(tmp_path), "--model", "tiny-llama", "--tokens")
    plain = firesteel(*arguments)
    assert "⟦a│ │😀₄│ │b│↵\n│↵\n│你₃│ │ │<|im_end|>⟧" in plain.stdout
    assert "│ stands between tokens, ₃ behind what takes 3 of them" in plain.stdout
    coloured = without_colours(firesteel(*arguments, **COLOURS).stdout)
    assert "a│ │😀₄│ │b│↵\n│↵\n│你₃│ │ │<|im_end|>" in coloured


def test_a_preview_marks_what_is_cut_and_names_what_is_dropped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 1)
    (row,) = json.loads(firesteel("preview", path, "--model", "tiny-llama", "--json").stdout)
    prompt, _, rejected = (len(part["tokens"]) for part in row["parts"])
    tokens = prompt + rejected - 2
    cut = firesteel(
        "preview", path, "--model", "tiny-llama", "--max-seq-len", tokens, "--truncate", "response_end"
    )
    assert "⟦nope ⟧  ✂ cut here: 2 tokens do not fit" in cut.stdout
    assert cut.stdout.count("✂") == 2
    with pytest.raises(DataError, match="max_seq_len: dropped: chosen has"):
        firesteel("preview", path, "--model", "tiny-llama", "--max-seq-len", tokens)


def test_a_preview_lets_no_text_command_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a\x1b[2J", "chosen": "[red]b\x07", "rejected": "c"}) + "\n")
    shown = firesteel("preview", path, "--model", "tiny-llama").stdout
    assert "a\\u001b[2J" in shown
    assert "[red]b\\u0007" in shown


def test_a_preview_can_be_read_by_programs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", 2)
    rows = json.loads(firesteel("preview", path, "--model", "tiny-llama", "--json").stdout)
    assert [row["line"] for row in rows] == [1, 2]
    assert [part["name"] for part in rows[0]["parts"]] == ["prompt", "chosen", "rejected"]
    tokens = rows[0]["parts"][1]["tokens"]
    assert "".join(token["text"] for token in tokens) == "yes 0<|im_end|>"
    assert len(tokens) == 6
    assert {token["scored"] for token in tokens} == {True}
    assert [set(token) for token in tokens] == [{"id", "text", "scored", "unfinished"}] * 6


def test_a_conversion_replaces_no_file_unasked_and_never_its_own(tmp_path: Path) -> None:
    source, out = Path(write_rows(tmp_path / "pairs.jsonl", 3)), tmp_path / "out.jsonl"
    out.write_text("precious")
    for target, reason in ((out, "--force replaces it"), (source, "that is the file itself")):
        before = target.read_text()
        with pytest.raises(ConfigError, match=reason):
            firesteel("convert", source, "--to", "samples", "--out", target)
        assert target.read_text() == before
    assert firesteel("convert", source, "--to", "samples", "--out", out, "--force").exit_code == 0
    assert "samples" in out.read_text()
