"""`report.html` of real runs: what it says is what the run has left, and nothing in it can do anything."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
import test_orpo
from made_runs import losses, made_run, margins
from pages import Reading, read_page
from runs import config, numbers, sft_config, write_chats, write_rows

from firesteel.sdk import CheckpointError, ConfigError
from training.recipes import dpo_loop, orpo_loop, sft_loop
from training.utils.heldout_rows import read_heldout
from training.utils.report import report_at_the_end, write_report
from training.utils.row_excerpts import LONGEST, read_back
from training.utils.runs import remove_run

NASTY = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' {{ 7*7 }} ]]> &lt;"


def nasty_rows(path: Path, count: int) -> str:
    rows = [
        {
            "prompt": f"{NASTY} {i}? ",
            "chosen": f"yes {i} <b>",
            "rejected": f"nope {i} </svg><style>*{{display:none}}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: `dpo` and `other` on the same rows, one of them lost, and `orpo`; `bare` has no held-out rows."""
    made = tmp_path_factory.mktemp("runs")
    heldout = nasty_rows(made / "heldout.jsonl", 12)
    rows = Path(write_rows(made / "rows.jsonl", 10))
    rows.write_text(rows.read_text() + '{"chosen": "<i>alone</i>"}\n')
    given = {
        "eval_dataset": heldout,
        "eval_interval": 2,
        "epochs": 2,
        "dataset": str(rows),
        "on_bad_row": "skip",
        "sample_prompts": [f"What is {NASTY}?"],
        "sample_max_tokens": 4,
        "dcp_save_interval": 5,
    }
    dpo_loop.main(config(made, log_path=str(made / "dpo"), **given))
    dpo_loop.main(config(made, log_path=str(made / "other"), **{**given, "beta": 0.3, "seed": 3}))
    orpo_loop.main(test_orpo.config(made, log_path=str(made / "orpo"), epochs=1, eval_dataset=heldout))
    dpo_loop.main(config(made, log_path=str(made / "bare")))
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Reading:
    return read_page(write_report([folder / "dpo"]))


def cells(values: list[float]) -> list[Any]:
    return [pytest.approx(value, rel=1e-3, abs=1e-6) for value in values]


def parsed(row: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in row]


def test_held_out_numbers_are_those_of_the_metrics(folder: Path, page: Reading) -> None:
    evaluated = [line for line in numbers(folder / "dpo") if "eval/margin" in line]
    table = page.tables["Held out"]
    for name in [name for name in evaluated[0] if name.startswith("eval/")]:
        told = parsed(table[name.removeprefix("eval/")])
        assert told == cells([evaluated[0][name], evaluated[-1][name]]), name


def test_numbers_of_the_steps_are_those_of_the_metrics(folder: Path, page: Reading) -> None:
    steps = [line for line in numbers(folder / "dpo") if "train/loss" in line]
    assert len(steps) == 10
    for name in steps[0].keys() - {"train/step"}:
        values = [line[name] for line in steps]
        told = parsed(page.tables["Training steps"][name])
        assert told == cells([values[0], values[-1], min(values), max(values)]), name


def test_each_chart_says_in_words_what_it_shows(folder: Path, page: Reading) -> None:
    titles = [told.partition(" by step")[0] for told in page.told]
    wanted = ["Loss (dpo_loss)", "Margin", "Accuracy", "Gradient norm", "Learning rate", "Tokens per second"]
    assert [title for title in wanted if title not in titles] == []
    evaluated = [line for line in numbers(folder / "dpo") if "eval/margin" in line]
    (margin,) = [told for told in page.told if told.startswith("Margin")]
    assert "training: 0" in margin or "training: " in margin
    assert f"held out: 0 at step 0, {evaluated[-1]['eval/margin']:.4g} at step 10" in margin


def test_the_page_loads_nothing_and_runs_nothing(folder: Path, page: Reading) -> None:
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "image", "a", "form", "base"}
    assert [tag for tag, _ in page.tags if tag in forbidden] == []
    outside = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if (name.endswith("href") or name == "src" or name.startswith("on"))
        and not str(value).startswith("#")
    ]
    assert outside == []
    text = (folder / "dpo/report.html").read_text()
    assert "://" not in text
    assert "@import" not in text
    assert "url(#" in text  # only names in the page itself
    assert text.count("url(") == text.count("url(#")


def test_names_within_the_page_are_unique_and_meet(page: Reading) -> None:
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    targets = [v[1:] for _, a in page.tags for n, v in a.items() if n.endswith("href") and v]
    assert set(targets) <= set(names)


def test_what_data_says_is_text(page: Reading) -> None:
    assert page.text.count(f"{NASTY} ") >= 10  # the prompts of the worst and the best rows
    assert f"What is {NASTY}?" in page.text
    assert "</svg><style>*{display:none}" in page.text


def test_headings_go_down_one_level_at_a_time_and_tables_have_headers(page: Reading) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 or after == 4 for before, after in pairwise(levels))
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_the_verdict_has_numbers_an_interval_and_what_was_lost(folder: Path, page: Reading) -> None:
    last = [line for line in numbers(folder / "dpo") if "eval/margin" in line][-1]
    assert f"Accuracy of 12 held-out rows: 0.000 → {last['eval/accuracy']:.3f} (95 % interval" in page.text
    chosen, rejected = last["eval/delta_logp/chosen"], last["eval/delta_logp/rejected"]
    assert f"by {chosen:+.2f} nats of log-probability and rejected ones by {rejected:+.2f}" in page.text
    said = json.loads((folder / "dpo/summary.json").read_text())["warnings"]
    assert ("Likelihood displacement" in page.text) == any("displacement" in line for line in said)
    assert "Only 12 rows are held out" in page.text
    assert "1 row of the data was refused" in page.text
    assert "rows.jsonl:11: refused: rejected" in page.text


def test_worst_and_best_rows_are_those_of_the_evaluation_with_their_texts(
    folder: Path, page: Reading
) -> None:
    after = read_heldout(folder / "dpo", 10)
    assert after is not None
    ranked = sorted(after.rows, key=lambda row: row.value)
    shown = [text.split(":")[0] for text in page.texts if text.startswith("Line ")]
    assert shown == [f"Line {row.line}" for row in (*ranked[:5], *ranked[::-1][:5])]
    assert f"yes {ranked[0].line - 1} <b>" in page.text
    mean = sum(row.value for row in after.rows) / 12
    assert mean == pytest.approx(
        json.loads((folder / "dpo/summary.json").read_text())["after"]["margin"], abs=1e-5
    )


def test_texts_are_shown_only_from_the_file_that_was_evaluated(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "dpo", tmp_path / "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    for rows, reason in (
        (nasty_rows(tmp_path / "rows.jsonl", 11), "is not what it was"),
        ("gone.jsonl", "no such file"),
    ):
        (tmp_path / "run/config.json").write_text(json.dumps({**settings, "eval_dataset": rows}))
        told = read_page(write_report([tmp_path / "run"])).text
        assert "Their texts are not shown" in told
        assert reason in told
        assert "yes 3 <b>" not in told


def test_the_same_run_gives_the_same_page(folder: Path) -> None:
    assert write_report([folder / "dpo"]).read_bytes() == write_report([folder / "dpo"]).read_bytes()


def test_a_run_that_is_not_finished_says_how_far_it_is(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "dpo", run)
    for name in ("summary.json", "samples.jsonl", "report.html"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-6]) + lines[-6][:30])
    told = read_page(write_report([run])).text
    assert "Not finished: 6 of 10 steps are logged." in told
    assert "damaged" not in told  # a line that is being written is no damage


def test_damaged_lines_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "dpo", run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3:3] = [b"{\xff\xfe\n", b"[1, 2]\n", b'{"train/loss": 5000}\n', b"\n"]
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    (run / "samples.jsonl").write_bytes(b"no json\n")
    (run / "bad_rows.jsonl").write_bytes(b'{"line": 3}\n')
    told = read_page(write_report([run]))
    assert "4 lines of metrics.jsonl are damaged and left out." in told.texts
    assert "a line of samples.jsonl is damaged" in told.text
    assert "1 line of bad_rows.jsonl is damaged and left out." in told.texts
    assert "5,000" not in told.tables["Training steps"]["train/loss"]


def test_a_run_of_nothing_but_settings_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"log_path": "x", "base_model": "y", "dataset": "z"}')
    told = read_page(write_report([tmp_path])).text
    assert "No step is logged yet." in told
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        write_report([tmp_path.parent / "none"])


def test_without_held_out_rows_nothing_is_concluded(folder: Path) -> None:
    page = read_page(write_report([folder / "bare"]))
    assert "Not known: no rows were held out." in page.text
    assert "Held out" not in page.tables
    assert [told for told in page.told if "held out" in told] == []


def test_orpo_has_its_own_names_and_no_reference(folder: Path) -> None:
    page = read_page(write_report([folder / "orpo"]))
    titles = [told.partition(" by step")[0] for told in page.told]
    assert {"Loss (orpo_loss)", "Loss (sft_loss)", "Log odds ratio", "Accuracy"} <= set(titles)
    assert "ORPO run: an adapter of rank 4 of tiny-llama" in page.text
    assert "log_odds_ratio" in page.tables["Held out"]
    assert "the reference" not in " ".join(page.told)
    assert [told for told in page.told if told.startswith("Held out, by log odds ratio. before: 12 values")]


def test_runs_beside_each_other(folder: Path, tmp_path: Path) -> None:
    runs = [folder / name for name in ("dpo", "other", "orpo")]
    page = read_page(write_report(runs, tmp_path / "page.html"))
    summaries = [json.loads((run / "summary.json").read_text())["after"] for run in runs]
    assert parsed(page.tables["Held out"]["accuracy"]) == cells([after["accuracy"] for after in summaries])
    assert page.tables["Held out"]["margin"][2] == "–"
    settings = page.tables[""]
    assert settings["beta"] == ["0.1", "0.3", "–"]
    assert settings["seed"] == ["0", "3", "0"]
    assert "base_model" not in settings
    assert "log_path" not in settings
    (accuracy,) = [told for told in page.told if told.startswith("Accuracy")]
    assert all(f"{name}, held out" in accuracy for name in ("dpo", "other", "orpo"))
    with pytest.raises(ConfigError, match="a run is named twice"):
        write_report([folder / "dpo", folder / "dpo"], tmp_path / "page.html")


def test_another_recipe_is_read_by_its_loss(tmp_path: Path) -> None:
    """Numbers of a recipe that this page has never heard of."""
    run = tmp_path / "sft"
    run.mkdir()
    (run / "config.json").write_text('{"log_path": "x", "base_model": "y", "dataset": "z", "lora_rank": 8}')
    lines = []
    for step in range(30_000):
        lines.append(
            {"train/step": step, "train/loss": 3 / (1 + step), "train/lr": 1e-5, "other/thing": step}
        )
        if step % 10_000 == 0:
            held = {"eval/loss": 2 - step / 20_000, "eval/perplexity": math.exp(2 - step / 20_000)}
            lines.append(
                {"train/step": step, **held, "eval/source/web/accuracy": 0.5, "eval/source/<b>/accuracy": 1}
            )
    (run / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    path = write_report([run])
    page = read_page(path)
    assert "Yes: the loss on rows that it was not trained on has come down." in page.text
    assert "Held-out perplexity: 7.39 → 2.72." in page.text
    assert parsed(page.tables["Held out"]["loss"]) == cells([2.0, 1.0])
    assert page.tables["Held out, by source"] == {
        "name": ["first", "last"],
        "web/accuracy": ["0.5", "0.5"],
        "<b>/accuracy": ["1", "1"],
    }
    assert [told for told in page.told if told.startswith("Held-out accuracy by source")]
    assert "mean of 200 steps" in page.text
    assert path.stat().st_size < 400_000


def test_a_long_text_is_cut_and_says_by_how_much(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 10**6, "chosen": "a", "rejected": "b"}) + "\n")
    from training.utils.jsonl import hash_of_file

    texts = read_back(path, hash_of_file(str(path))[0], {1})
    assert not isinstance(texts, str)
    prompt = texts[1].parts["prompt"]
    assert len(prompt) < LONGEST + 40
    assert f"{10**6 - LONGEST + 1:,} characters" in prompt or "characters…" in prompt
    assert read_back(path, "0" * 64, {1}) == f"{path} is not what it was when the run began"


def test_nothing_but_a_report_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match="is there already and is no report"):
        write_report([folder / "dpo"], tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_run_ends_with_its_report_and_deletes_it_with_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, report=True, eval_fraction=0.3)
    dpo_loop.main(settings)
    assert f"report: {tmp_path}/run/report.html (" in capsys.readouterr().out
    assert "Finished after 2 steps" in read_page(tmp_path / "run/report.html").text
    dpo_loop.main(settings)  # the first is set aside, its report with it
    assert (tmp_path / "run/previous-1/report.html").exists()
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_report_that_cannot_be_written_is_said_and_the_run_is_finished(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "bare", run, ignore=shutil.ignore_patterns("report.html"))
    (run / "report.html").mkdir()
    assert report_at_the_end(run).startswith("report: not written: ")


def test_the_pairs_of_a_ranked_list_are_told_apart_and_show_their_two_answers(tmp_path: Path) -> None:
    """Eight answers make 28 pairs, or 27 where the fourth and the fifth are tied."""
    lists = [
        {
            "prompt": f"Q{i}? ",
            "completions": [
                {"text": f"answer {'y' * n} of {i}", "score": -n - (i == 1 and n == 3)} for n in range(8)
            ],
        }
        for i in range(4)
    ]
    path = tmp_path / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    dpo_loop.main(config(tmp_path, eval_dataset=str(path)))
    after = read_heldout(tmp_path / "run", 3)
    assert after is not None
    assert [len([row for row in after.rows if row.line == line]) for line in (1, 2, 3, 4)] == [28, 27, 28, 28]
    page = read_page(write_report([tmp_path / "run"]))
    assert "(6 rows, 4 held out: 111 pairs)" in page.text
    ranked = sorted(after.rows, key=lambda row: row.value)
    places = [t.split(":")[0] for t in page.texts if t.startswith("Line ")]
    assert places == [f"Line {row.line}, pair {row.pair}" for row in (*ranked[:5], *ranked[::-1][:5])]
    shown = [text for text in page.texts if text.startswith(("chosen: answer", "rejected: answer"))]
    for place, row in enumerate((*ranked[:5], *ranked[::-1][:5])):
        twos = [(b, w) for b in range(8) for w in range(b + 1, 8) if row.line != 2 or (b, w) != (3, 4)]
        better, worse = twos[row.pair - 1]
        sides = shown[2 * place : 2 * place + 2]
        assert sides == [f"chosen: answer {better + 1} of 8", f"rejected: answer {worse + 1} of 8"]
        assert f"answer {'y' * better} of {row.line - 1}" in page.texts
        assert f"answer {'y' * worse} of {row.line - 1}" in page.texts
    assert sum(len(row.tokens) for row in after.rows) == 222


def test_sft_is_read_by_its_loss_and_shows_the_rows_that_it_finds_hardest(tmp_path: Path) -> None:
    held = write_chats(tmp_path / "held.jsonl", 6, start=50)
    sft_loop.main(sft_config(tmp_path, eval_dataset=held, epochs=3))
    after = read_heldout(tmp_path / "run", 9)
    assert after is not None
    summary = json.loads((tmp_path / "run/summary.json").read_text())["after"]
    weights = [
        row.tokens["learned"] * (2 if (row.line + 49) % 3 == 0 else 1) for row in after.rows
    ]  # see write_chats
    mean = sum(row.value * weight for row, weight in zip(after.rows, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(summary["sft_loss"], rel=1e-5)
    page = read_page(write_report([tmp_path / "run"]))
    assert "SFT run: an adapter of rank 4 of tiny-llama" in page.text
    assert "(8 rows, 6 held out)" in page.text
    assert "Yes: the loss on rows that it was not trained on has come down." in page.text
    worst = max(after.rows, key=lambda row: row.value)
    shown = [text.split(":")[0] for text in page.texts if text.startswith("Line ")]
    assert shown[0] == f"Line {worst.line}"
    assert "answer" in page.texts
    assert "above 0" not in " ".join(page.told)


def test_a_run_keeps_what_it_says_of_its_data_and_claims_nothing_of_rows_that_it_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", 40)
    settings = config(tmp_path, dataset=rows, eval_dataset=rows, batch_size=20, epochs=3, dcp_save_interval=2)
    summary = dpo_loop.main(settings)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    kept = json.loads((tmp_path / "run/environment.json").read_text())["doubts"]
    assert [doubt["name"] for doubt in kept if doubt["about"] == "eval_dataset"] == [
        "held-out-prompts",
        "held-out-rows",
    ]
    assert [f"warning: {doubt['about']}: {doubt['text']}" for doubt in kept] == said[: len(kept)]
    assert summary.warnings[: len(kept)] == [f"{doubt['about']}: {doubt['text']}" for doubt in kept]
    told = read_page(write_report([tmp_path / "run"]))
    assert summary.after["accuracy"] == 1
    assert (
        "prefers the chosen answers of the held-out rows, but all of them are among the training rows"
        in told.text
    )
    assert "not trained on" not in told.text
    assert all(f"{doubt['about']}: {doubt['text']}." in told.texts for doubt in kept)

    clean = write_rows(tmp_path / "clean.jsonl", 40, start=100)
    dpo_loop.main(settings.model_copy(update={"eval_dataset": clean, "epochs": 4}))  # goes on
    kept = json.loads((tmp_path / "run/environment.json").read_text())["doubts"]
    assert [doubt for doubt in kept if doubt["about"] == "eval_dataset"] == []
    assert "of rows that it was not trained on" in read_page(write_report([tmp_path / "run"])).text


def test_a_run_that_noted_nothing_of_its_data_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "dpo", tmp_path / "run")
    path = tmp_path / "run/environment.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "doubts"}))
    assert "DPO run: an adapter of rank 4 of tiny-llama" in read_page(write_report([tmp_path / "run"])).text


def heldout_charts(page: Reading) -> list[str]:
    return [told for told in page.told if told.startswith("Held out, by ")]


def test_values_of_several_measures_share_no_axis(tmp_path: Path) -> None:
    runs = {
        "summed": {},
        "again": {"beta": 0.3},
        "norm": {"loss": "sigmoid_norm"},
        "ipo": {"loss": "ipo_mean"},
        "simpo": {"loss": "simpo"},
    }
    for place, (name, settings) in enumerate(runs.items()):
        made_run(tmp_path / name, (), (margins([0.0, 0.0]), margins([place, place + 0.5])), **settings)
    odds = replace(margins([7.0, 8.0]), measure="log_odds_ratio")
    made_run(tmp_path / "orpo", (), (odds, odds), orpo_lambda=0.1)
    made_run(tmp_path / "sft", (), (losses([2.0]), losses([1.0])))
    names = [*runs, "orpo", "sft"]
    for name in names[:5]:
        lines = [{"train/step": step, "train/margin": 1.0} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(write_report([tmp_path / name for name in names], tmp_path / "page.html"))
    assert heldout_charts(page) == [
        "Held out, by margin. summed: 2 values, median 0.25, 50.0% above 0; "
        "again: 2 values, median 1.25, 100.0% above 0.",
        "Held out, by margin per token. norm: 2 values, median 2.25, 100.0% above 0; "
        "ipo: 2 values, median 3.25, 100.0% above 0.",
        "Held out, by margin per token, without a reference. simpo: 2 values, median 4.25, 100.0% above 0.",
        "Held out, by log odds ratio. orpo: 2 values, median 7.5, 100.0% above 0.",
        "Held out, by sft_loss. sft: 1 value, median 1.",
    ]
    one = "training: 1 at step 1, 1 at step 2, lowest 1, highest 1"
    assert [told for told in page.told if told.startswith("Margin")] == [
        f"Margin by step. summed, {one}; again, {one}.",
        f"Margin per token by step. norm, {one}; ipo, {one}.",
        f"Margin per token, without a reference by step. simpo, {one}.",
    ]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_what_is_told_below_a_histogram_is_the_median_and_the_share_that_is_no_tie(tmp_path: Path) -> None:
    """The mean of these is 20, and -0.0005 and 0.0005 are ties."""
    after = [-0.0005, 0.0005, 0.0015, 0.5, 99.4985]
    made_run(tmp_path, (), (margins([0.0, 0.0005, -0.0005, 0.0, 0.0]), margins(after)))
    page = read_page(write_report([tmp_path]))
    told = "after step 9: 5 values, median 0.0015, 60.0% above 0."
    assert heldout_charts(page) == [f"Held out, by margin. {told}"]
    assert f"{told} Before training all are 0: the policy is its reference." in page.texts


def test_a_margin_per_token_is_a_tie_by_the_tokens_of_its_shorter_side(tmp_path: Path) -> None:
    """Of 10 tokens, a tie is up to 0.0001."""
    made_run(tmp_path, (), (margins([0.00005, 0.0]), margins([0.00009, 0.0002])), loss="sigmoid_norm")
    told = " ".join(read_page(write_report([tmp_path])).texts)
    assert "2 values, median 0.000145, 50.0% above 0. Before training all are 0" in told
    made_run(tmp_path, (), (margins([0.0002, 0.0]), margins([0.00009, 0.0002])), loss="sigmoid_norm")
    told = " ".join(read_page(write_report([tmp_path])).texts)
    assert "before: 2 values, median 0.0001, 50.0% above 0; after step 9: " in told
    assert "Before training all are 0" not in told


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo_mean", "simpo", "orpo"])
def test_the_share_above_0_is_the_accuracy(tmp_path: Path, loss: str) -> None:
    """Of a policy that has hardly moved, so that ties decide."""
    held = {"eval_dataset": write_rows(tmp_path / "held.jsonl", 11, start=50), "learning_rate": 2e-6}
    if loss == "orpo":
        summary = orpo_loop.main(test_orpo.config(tmp_path, **held))
    else:
        summary = dpo_loop.main(config(tmp_path, loss=loss, beta=2.0, **held))
    (told,) = heldout_charts(read_page(write_report([tmp_path / "run"])))
    assert f", {summary.after['accuracy']:.1%} above 0." in told


def test_losses_that_are_all_small_are_no_ties(tmp_path: Path) -> None:
    made_run(tmp_path, (), (losses([0.0001, 0.0002]), losses([0.0001, 0.0001])))
    told = " ".join(read_page(write_report([tmp_path])).texts)
    assert "before: 2 values, median 0.00015; after step 9: 2 values, median 0.0001." in told


def test_a_run_that_ended_before_its_first_checkpoint_says_when_it_would_have_saved(tmp_path: Path) -> None:
    for interval, said in (
        (0, "This run cannot be gone on with: it saves none (dcp_save_interval)."),
        (1, "It ended before its first; one is saved every 1 step (dcp_save_interval)."),
        (50, "one is saved every 50 steps (dcp_save_interval). Started again, it begins at its first step."),
    ):
        made_run(tmp_path, (), dcp_save_interval=interval)
        assert said in read_page(write_report([tmp_path])).text
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1, "train/loss": 1}\n')
    assert "Not finished: 1 step is logged." in read_page(write_report([tmp_path])).text


@pytest.mark.parametrize(
    "after",
    [
        {"nonfinite_rows": 2},
        {"dpo_loss": None, "margin": None, "accuracy": None, "accuracy_low": None, "tie_rate": None},
        {"sft_loss": None, "perplexity": None, "source/web/sft_loss": None},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_numbers_that_are_none_have_a_page(
    tmp_path: Path, after: dict[str, float | None], finished: bool
) -> None:
    lost = margins([math.nan, math.nan])
    made_run(tmp_path, ({}, after), (lost, lost))
    if finished:
        (tmp_path / "summary.json").write_text(json.dumps({"steps": 9, "before": {}, "after": after}))
    page = read_page(write_report([tmp_path]))
    assert "No: not one held-out row has finite log-probabilities." in page.texts
    assert any("2 values are not finite" in text for text in page.texts)
    name, value = next(iter(after.items()))
    assert page.tables["Held out"][name][1] == ("not finite" if value is None else "2")


def test_the_loss_of_each_source_is_drawn_once_together_and_in_a_table(tmp_path: Path) -> None:
    held = Path(write_chats(tmp_path / "held.jsonl", 9, start=50))
    rows = [json.loads(line) for line in held.read_text().splitlines()]
    named = [{**row, "source": ("web", "books", "<b>")[i % 3]} for i, row in enumerate(rows)]
    held.write_text("".join(json.dumps(row) + "\n" for row in named))
    sft_loop.main(sft_config(tmp_path, eval_dataset=str(held), eval_interval=1))
    page = read_page(write_report([tmp_path / "run"]))
    evaluated = [line for line in numbers(tmp_path / "run") if "eval/sft_loss" in line]
    assert len(evaluated) == 4
    table = page.tables["Held out, by source"]
    for name in ("web", "books", "<b>"):
        values = [line[f"eval/source/{name}/sft_loss"] for line in evaluated]
        assert parsed(table[f"{name}/sft_loss"]) == cells([values[0], values[-1]])
        assert table[f"{name}/count"] == ["3", "3"]
    (told,) = [told for told in page.told if "books" in told]
    assert told.startswith("Held-out loss by source by step. <b>: ")
    first, last = (line["eval/source/books/sft_loss"] for line in (evaluated[0], evaluated[-1]))
    assert f"books: {first:.4g} at step 0, {last:.4g} at step 3, " in told
    assert not [name for name in page.tables["Held out"] if "source/" in name]


def test_sources_of_several_runs_are_in_a_table_a_column_each(tmp_path: Path) -> None:
    made_run(tmp_path / "a", ({"source/web/sft_loss": 2.0}, {"source/web/sft_loss": 1.5}))
    made_run(tmp_path / "b", ({}, {"source/web/sft_loss": 1.25, "source/books/sft_loss": 3.0}))
    page = read_page(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    table = page.tables["Held out, by source"]
    assert table["web/sft_loss"] == ["1.5", "1.25"]
    assert table["books/sft_loss"] == ["–", "3"]
    assert page.told == []
