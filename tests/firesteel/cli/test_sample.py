"""`firesteel sample`, on real runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import RANKS, config
from typer.testing import CliRunner

from firesteel.cli.main import app
from firesteel.engine import host
from firesteel.model_size import parameters_of
from firesteel.sdk import CheckpointError, ConfigError, ModelError
from training.recipes import sft_loop
from training.recipes.dpo_loop import main
from training.utils.config import TrainerConfig
from training.utils.rendering import Renderer
from training.utils.sampling import MOST_TOKENS, SampledAnswer, Sampling, Subject, subject_of, trying
from transports import service_in, serving

PROMPTS = ("Question 1?", "Question 2?")
TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, `lora` and `full`, that have learned something, with checkpoints of steps 3 and 6."""
    made = tmp_path_factory.mktemp("folder")
    for name, rank in (("lora", 4), ("full", 0)):
        settings = {"sample_prompts": PROMPTS, "sample_max_tokens": TOKENS, "learning_rate": 1e-2}
        main(config(made / name, lora_rank=rank, epochs=2, dcp_save_interval=3, **settings))
    return made


def firesteel(*arguments: object, stdin: str | None = None) -> str:
    """What it prints; its errors are raised."""
    given = [str(argument) for argument in ("sample", *arguments)]
    result = CliRunner().invoke(app, given, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def asked(*arguments: object, stdin: str | None = None) -> list[dict[str, dict[str, object]]]:
    return [json.loads(line) for line in firesteel(*arguments, "--json", stdin=stdin).splitlines()]


def of(prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    return [part for prompt in prompts for part in ("--prompt", prompt)]


def written(run: Path, when: str) -> list[str]:
    return [json.loads(line)[when] for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_and_its_base_say_what_the_run_wrote_down_after_and_before(folder: Path, name: str) -> None:
    run = folder / name / "run"
    exchanges = asked(run, *of(), "--base", "--max-tokens", TOKENS)
    after, before = ([exchange[who]["text"] for exchange in exchanges] for who in ("answer", "base"))
    assert after == written(run, "after")
    assert before == written(run, "before")
    assert after != before


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_lines_of_standard_input_are_prompts_and_its_end_is_the_end(folder: Path, name: str) -> None:
    run = folder / name / "run"
    settings = ("--base", "--max-tokens", TOKENS)
    assert asked(run, *settings, stdin="\n".join(PROMPTS)) == asked(run, *of(), *settings)
    assert firesteel(run, stdin="") == ""


def test_of_all_weights_and_their_base_one_is_in_memory_at_a_time_unless_lines_are_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 4 * parameters_of(folder / "full/run/model")
    monkeypatch.setattr(host, "capacity_of", lambda device: int(1.5 * one))
    with trying(subject_of(str(folder / "full/run"))) as tried:
        assert len(tried.exchanges(PROMPTS, Sampling(TOKENS), with_base=True)) == 2
    with trying(subject_of(str(folder / "full/run"))) as tried, pytest.raises(ModelError, match="needs 0"):
        tried.exchange(PROMPTS[0], Sampling(TOKENS), with_base=True)


def test_an_earlier_step_says_something_else(folder: Path) -> None:
    run = folder / "lora/run"
    first, last = (asked(run, *of(), "--step", step, "--max-tokens", 64) for step in (3, 6))
    assert first != last
    assert last == asked(run, *of(), "--max-tokens", 64)
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there is 3, 6"):
        firesteel(run, *of(), "--step", 4)


def test_of_a_run_that_goes_on_the_newest_checkpoint_is_tried_though_the_one_before_was_pruned(
    folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "lora/run", run)
    (run / "summary.json").unlink()
    shutil.move(run / "checkpoints/step-6", tmp_path / "later")
    (run / "checkpoints.jsonl").write_text((run / "checkpoints.jsonl").read_text().splitlines()[0] + "\n")
    subject = subject_of(str(run))
    assert subject.weights is not None
    assert subject.weights.name == "step-3"
    shutil.rmtree(run / "checkpoints/step-3")
    shutil.move(tmp_path / "later", run / "checkpoints/step-6")
    (run / "checkpoints.jsonl").write_text("")
    with trying(subject) as tried:
        answer = tried.exchange(PROMPTS[0], Sampling(TOKENS), with_base=False).answer
    assert answer.text == written(run, "after")[0]


@RANKS
def test_a_run_without_checkpoints_is_tried_by_what_it_exported(tmp_path: Path, rank: int) -> None:
    settings = {"sample_prompts": PROMPTS, "sample_max_tokens": TOKENS}
    main(config(tmp_path, lora_rank=rank, **settings))
    exchanges = asked(tmp_path / "run", *of(), "--base", "--max-tokens", TOKENS)
    assert [exchange["answer"]["text"] for exchange in exchanges] == written(tmp_path / "run", "after")
    assert [exchange["base"]["text"] for exchange in exchanges] == written(tmp_path / "run", "before")


def test_a_model_by_itself_says_what_it_says_as_a_base(folder: Path) -> None:
    alone = asked("tiny-llama", *of(), "--max-tokens", TOKENS)
    as_base = asked(folder / "lora/run", *of(), "--base", "--max-tokens", TOKENS)
    assert [one["answer"] for one in alone] == [one["base"] for one in as_base]
    exported = asked(folder / "full/run/model", *of(), "--max-tokens", TOKENS)
    assert exported == asked(folder / "full/run", *of(), "--max-tokens", TOKENS)


def test_a_drawn_answer_comes_again_with_its_seed_only(folder: Path) -> None:
    drawn = [
        asked(folder / "lora/run", *of(), "--temperature", 1, "--seed", seed, "--max-tokens", 32)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ConfigError, match="seed is not read at temperature 0"):
        firesteel(folder / "lora/run", *of(), "--seed", 1)


def test_an_answer_that_was_cut_is_said_to_be(folder: Path) -> None:
    printed = firesteel(folder / "lora/run", *of(), "--base", "--max-tokens", 2)
    assert printed.splitlines()[0] == f"Q: {PROMPTS[0]}"
    assert printed.count("(cut at 2 tokens; --max-tokens allows more)") == 4
    assert printed.index("base:") < printed.index("trained:")


def test_without_a_limit_an_answer_is_as_long_as_the_model_has_room_for_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = tmp_path / "catalog.yaml"
    shape = "{base_model: '*', mode: FORWARD_ONLY, device: cpu, dtype: float32, max_context_length: 60}"
    catalog.write_text(f"shapes:\n  short: {shape}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    short = Subject("tiny-llama", "tiny-llama", trainer=TrainerConfig(reference_training_shape_id="short"))
    asked = len(Renderer.load("tiny-llama").question(PROMPTS[0]))
    with trying(short) as tried:
        answer = tried.exchange(PROMPTS[0], Sampling(), with_base=False).answer
    assert (answer.tokens, answer.cut) == (60 - asked, True)
    with trying(subject_of("tiny-llama")) as tried:
        assert tried.exchange(PROMPTS[0], Sampling(), with_base=False).answer.tokens <= MOST_TOKENS


def test_an_answer_that_ends_with_its_last_token_was_not_cut() -> None:
    with trying(subject_of("tiny-llama")) as tried:

        def drawn(seed: int, tokens: int | None = None) -> SampledAnswer:
            sampling = Sampling(tokens, temperature=1.0, seed=seed)
            return tried.exchange(PROMPTS[0], sampling, with_base=False).answer

        seed, ended = next((seed, answer) for seed in range(50) if not (answer := drawn(seed)).cut)
        assert drawn(seed, ended.tokens) == ended
        before = drawn(seed, ended.tokens - 1)
    assert (before.cut, before.text) == (True, ended.text)


def test_a_server_says_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--base", "--max-tokens", TOKENS)
    here = [asked(folder / name / "run", *of(), *settings) for name in ("lora", "full")]
    with service_in(tmp_path / "service", "tiny-llama") as service, serving(service) as server:
        monkeypatch.setenv("FIRESTEEL_BASE_URL", server.url)
        monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
        assert [asked(folder / name / "run", *of(), *settings) for name in ("lora", "full")] == here
        assert service.sessions.all() == []


def test_what_cannot_be_tried_is_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    run = folder / "lora/run"
    with pytest.raises(ConfigError, match="says nothing; write what the user asks"):
        firesteel(run, "--prompt", "  ")
    with pytest.raises(CheckpointError, match="the folder neither of a run nor of a model"):
        firesteel(tmp_path, *of())
    with pytest.raises(CheckpointError, match=rf"its run is `firesteel sample {run} --step 3`"):
        firesteel(run / "checkpoints/step-3", *of())
    with pytest.raises(
        ModelError, match="there is no run folder nobody, and as a model: model 'nobody' is not"
    ):
        firesteel("nobody", *of())
    with pytest.raises(ConfigError, match="--step: tiny-llama is not the folder of a run"):
        firesteel("tiny-llama", *of(), "--step", 3)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no weights yet: .*--dcp-save-interval"):
        firesteel(tmp_path, *of())


def test_at_a_terminal_a_line_that_cannot_be_answered_does_not_end_the_session(folder: Path) -> None:
    code = (
        "import pty, sys\n"
        "pty.spawn([sys.executable, '-m', 'firesteel.cli.main', 'sample', sys.argv[1], '--max-tokens', '8190'])\n"
    )
    typed = "no room is left for this\n\nnor for this\n\x04"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder / "lora/run")],
        input=typed, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert ran.stdout.count("> error[operation]: sample: ") == 2
    assert "Traceback" not in ran.stdout


def test_a_run_of_another_recipe_is_tried_just_so(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": "yes"}) + "\n" for p in PROMPTS))
    settings = {"sample_prompts": PROMPTS, "sample_max_tokens": TOKENS, "learning_rate": 1e-2, "epochs": 3}
    run = tmp_path / "run"
    sft_loop.main(
        sft_loop.Config(
            log_path=str(run), base_model="tiny-llama", dataset=str(data), lora_rank=4, **settings
        )
    )
    assert [one["answer"]["text"] for one in asked(run, *of(), "--max-tokens", TOKENS)] == written(
        run, "after"
    )
