"""The DPO recipe from file to exported weights, on a real tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import config, write_rows
from safetensors.numpy import load_file

from firesteel.engine import attention, host
from firesteel.sdk import AdamParams, ConfigError, DataError, ModelError, VerificationFailed
from training.recipes.dpo_loop import Config, main
from training.utils.data_estimate import estimate
from training.utils.evaluation import Answers
from training.utils.progress import Display
from training.utils.training_run import RunSummary

TIMED = {"train/step_time_sec", "train/tokens_per_sec", "train/data_wait_sec"}
TIMED |= {"reference/cache_hits", "reference/computed", "reference/tokens"}


def records(path: Path) -> list[dict[str, float]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def steps(path: Path) -> list[dict[str, float]]:
    return [record for record in records(path) if "train/dpo_loss" in record]


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_run_starts_at_ln_2_learns_the_preference_and_exports(tmp_path: Path, rank: int) -> None:
    rate = 3e-3 if rank else 3e-4
    summary = main(
        config(
            tmp_path,
            lora_rank=rank,
            learning_rate=rate,
            epochs=3,
            eval_dataset=write_rows(tmp_path / "heldout.jsonl", 4, start=50),
        )
    )
    run = tmp_path / "run"
    losses = [record["train/dpo_loss"] for record in steps(run)]
    assert summary.steps == len(losses) == 9
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert summary.before["margin"] == pytest.approx(0, abs=1e-4)
    assert (summary.before["accuracy"], summary.before["tie_rate"]) == (0, 1)
    assert summary.after["margin"] > 0
    assert summary.after["accuracy"] == 1
    assert {path.name for path in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "bad_rows.jsonl",
        "samples.jsonl",
        "summary.json",
        "environment.json",
        "heldout",
        "adapter" if rank else "model",
    }
    assert json.loads((run / "config.json").read_text())["beta"] == 0.1


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_two_runs_are_equal_to_the_bit_and_another_seed_is_not(tmp_path: Path, rank: int) -> None:
    outcomes = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        folder = tmp_path / name
        folder.mkdir()
        summary = main(config(folder, lora_rank=rank, seed=seed, epochs=2))
        (weights,) = Path(summary.export_path).glob("*.safetensors")
        outcomes.append((records(folder / "run"), weights.read_bytes()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != outcomes[2][0]
    assert outcomes[0][1] != outcomes[2][1]


def test_every_step_logs_the_guides_names_and_trls(tmp_path: Path) -> None:
    main(config(tmp_path))
    expected = {"train/step", "train/epoch", "train/lr", "train/dpo_loss", "train/loss", "train/margin"}
    expected |= {"train/accuracy", "train/grad_norm", "train/step_tokens", "train/tie_rate"}
    expected |= {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    expected |= {"train/computed_tokens", "train/micro_batches", "train/activation_gib"}
    expected |= {"logps/chosen", "logps/rejected", "delta_logp/chosen", "delta_logp/rejected"}
    assert expected <= set(steps(tmp_path / "run")[0])


def test_the_last_smaller_batch_is_trained_and_divides_by_its_own_pairs(tmp_path: Path) -> None:
    assert main(config(tmp_path, count=5)).steps == 3
    last = steps(tmp_path / "run")[-1]
    # One pair: its loss is that of its margin, undivided.
    assert last["train/dpo_loss"] == pytest.approx(math.log1p(math.exp(-0.1 * last["train/margin"])))


def test_a_batch_that_is_not_full_has_the_gradient_of_its_own_mean(tmp_path: Path) -> None:
    norms = []
    for size in (1, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        main(config(folder, count=1, batch_size=size))
        norms.append([record["train/grad_norm"] for record in steps(folder / "run")])
    assert norms[0] == norms[1]  # divided by batch_size, the second would be an eighth
    assert norms[0][0] > 0


def test_a_second_run_takes_the_reference_from_the_cache_and_gives_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, count=7, seed=3)
    main(settings)
    capsys.readouterr()
    main(settings)
    said = capsys.readouterr().out
    assert "7 from the cache, 0 computed" in said
    assert f"moved to {tmp_path / 'run' / 'previous-1'}" in said
    assert records(tmp_path / "run") == records(tmp_path / "run/previous-1")


def test_what_only_the_training_depends_on_does_not_miss_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    main(config(tmp_path, count=8))
    capsys.readouterr()
    main(
        config(
            tmp_path,
            count=8,
            log_path=str(tmp_path / "other"),
            seed=4,
            beta=0.3,
            learning_rate=1e-5,
            batch_size=3,
            epochs=2,
            label_smoothing=0.1,
            eval_fraction=0.3,
        )
    )
    assert "8 from the cache, 0 computed" in capsys.readouterr().out


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_the_reference_stands_still_while_the_policy_moves(tmp_path: Path, rank: int) -> None:
    summary = main(config(tmp_path, count=10, lora_rank=rank, epochs=2, eval_fraction=0.3))
    for side in ("chosen", "rejected"):
        before, after = (
            metrics[f"logps/{side}"] - metrics[f"delta_logp/{side}"]
            for metrics in (summary.before, summary.after)
        )
        assert after == pytest.approx(before, abs=1e-9)
        assert abs(summary.after[f"delta_logp/{side}"]) > 0.1
        assert abs(summary.before[f"delta_logp/{side}"]) < 1e-4


def test_a_reference_of_its_own_gives_a_lora_run_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for name, trainer in (
        ("shared", {}),
        ("separate", {"reference_training_shape_id": "accounts/local/trainingShapes/cpu-forward"}),
    ):
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / name / "home"))  # nothing cached by the other
        (tmp_path / name).mkdir()
        summary = main(config(tmp_path / name, trainer=trainer))
        outcomes.append((summary, [record["train/dpo_loss"] for record in steps(tmp_path / name / "run")]))
    assert outcomes[0][0].reference_job_id is None
    assert outcomes[1][0].reference_job_id is not None
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], abs=1e-6)


def test_rows_over_the_limit_are_dropped_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    settings = config(tmp_path, count=4, max_seq_len=120)
    long = {"prompt": "Q", "chosen": "a" * 300, "rejected": "b"}
    chat = json.loads(data.read_text().splitlines()[0])
    chat["chosen"][0]["content"] = long["chosen"]
    with data.open("a") as file:
        file.write(json.dumps(chat) + "\n")
    main(settings)
    (listed,) = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert (listed["line"], listed["outcome"]) == (5, "dropped")
    assert "more than max_seq_len 120" in listed["reason"]
    assert "4 pairs; 1 dropped" in capsys.readouterr().out


def test_responses_over_the_limit_are_cut_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, count=3, max_seq_len=120, truncate="response_end")
    data = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["chosen"][0]["content"] = "a" * 300
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(settings)
    (listed,) = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert (listed["file"], listed["line"], listed["outcome"]) == (str(data), 2, "shortened")
    assert "3 pairs; 1 shortened" in capsys.readouterr().out
    assert sum(record["train/step_tokens"] for record in steps(tmp_path / "run")) <= 6 * 120


def test_no_more_than_max_pairs_are_used_and_they_are_the_first(tmp_path: Path) -> None:
    outcomes = []
    for name, count, most in (("all", 3, None), ("some", 9, 3)):
        folder = tmp_path / name
        folder.mkdir()
        assert main(config(folder, count=count, max_pairs=most)).steps == 2
        outcomes.append(records(folder / "run"))
    assert outcomes[0] == outcomes[1]


def test_bad_rows_stop_the_run_before_a_model_is_looked_for(tmp_path: Path) -> None:
    settings = config(tmp_path, base_model="no-such-model", tokenizer_model="tiny-llama")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write('{"prompt": []}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:7"):
        main(settings)
    assert not (tmp_path / "run").exists()  # an earlier run in it would have been left alone
    (tmp_path / "good").mkdir()
    with pytest.raises(ModelError, match="no-such-model"):
        main(config(tmp_path / "good", base_model="no-such-model", tokenizer_model="tiny-llama"))


def test_skipped_rows_are_listed_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = config(tmp_path, on_bad_row="skip")
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("not json\n")
    assert main(settings).steps == 3
    (listed,) = [json.loads(line) for line in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    assert (listed["line"], listed["outcome"]) == (7, "refused")


def test_a_fraction_is_held_out_and_evaluated_at_the_interval(tmp_path: Path) -> None:
    summary = main(config(tmp_path, count=10, eval_fraction=0.2, eval_interval=2))
    assert summary.steps == 4  # 8 pairs, 2 a step
    evaluated = [r["train/step"] for r in records(tmp_path / "run") if "eval/margin" in r]
    assert evaluated == [0, 2, 4]


def test_answers_before_and_after_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(tmp_path, sample_prompts=("Question 1?",), sample_max_tokens=5))
    (answer,) = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert set(answer) == {"prompt", "before", "after"}
    assert answer["prompt"] == "Question 1?"
    assert "Q: Question 1?" in capsys.readouterr().out


def test_the_answer_after_training_is_that_of_the_trained_model(tmp_path: Path) -> None:
    asked = {"sample_prompts": ("Question 1?",), "sample_max_tokens": 8}
    main(config(tmp_path, lora_rank=0, learning_rate=1e-2, epochs=5, **asked))
    answer = json.loads((tmp_path / "run/samples.jsonl").read_text())
    assert answer["before"] != answer["after"]
    other = tmp_path / "other"
    other.mkdir()
    main(config(other, base_model=str(tmp_path / "run/model"), max_pairs=1, **asked))
    assert json.loads((other / "run/samples.jsonl").read_text())["before"] == answer["after"]


def test_questions_that_cannot_be_asked_are_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(tmp_path, lora_rank=0, max_pairs=1))
    model = tmp_path / "run/model"
    (model / "chat_template.jinja").unlink(missing_ok=True)
    described = model / "tokenizer_config.json"
    tokenizer = json.loads(described.read_text())
    tokenizer.pop("chat_template", None)
    described.write_text(json.dumps(tokenizer))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "Question? ", "chosen": "yes", "rejected": "no"}\n')
    capsys.readouterr()
    settings = {"base_model": str(model), "dataset": str(plain), "log_path": str(tmp_path / "other")}
    with pytest.raises(ModelError, match="no chat template"):
        main(config(tmp_path, **settings, sample_prompts=("Hello?",)))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "other").exists()
    assert main(config(tmp_path, **settings)).steps == 1  # the rows themselves need no template


def test_a_question_that_leaves_no_room_for_its_answer_is_refused_before_a_model_is_loaded(
    tmp_path: Path, short_trainer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"trainer": short_trainer, "sample_max_tokens": 8}
    main(config(tmp_path / "fits", **asked, sample_prompts="Hi?"))

    def load(*arguments: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(host, "load_base", load)
    with pytest.raises(ConfigError, match=r'sample_prompts: prompt 2, "wo.*has 4\d tokens.* 8 .*40 that the'):
        main(config(tmp_path / "long", **asked, sample_prompts=("Hi?", "words " * 5)))
    with pytest.raises(ConfigError, match=r"prompt 1.*more than the 40 that the trainer takes"):
        estimate(
            config(tmp_path / "long", **{**asked, "sample_max_tokens": 38}, sample_prompts="Hi?"), Display()
        )


def test_one_sample_prompt_needs_no_list(tmp_path: Path) -> None:
    assert config(tmp_path, sample_prompts="Hi").sample_prompts == ("Hi",)
    assert config(tmp_path, sample_prompts=["Hi", "you"]).sample_prompts == ("Hi", "you")
    with pytest.raises(ConfigError, match=r"sample_prompts: expected one text, or a list.*\['Hello.*got 5"):
        config(tmp_path, sample_prompts=5)


def test_the_schedule_and_the_rate_reach_the_optimizer(tmp_path: Path) -> None:
    main(config(tmp_path, lr_scheduler="linear"))
    assert [record["train/lr"] for record in steps(tmp_path / "run")] == pytest.approx([2e-3, 1e-3, 0])


def test_every_optimizer_setting_reaches_the_step_under_its_own_name(tmp_path: Path) -> None:
    settings = config(
        tmp_path, weight_decay=0.25, adam_beta1=0.5, adam_beta2=0.75, adam_eps=1e-3, grad_clip_norm=2.0
    )
    assert settings.adam_params(0.125) == AdamParams(
        learning_rate=0.125, beta1=0.5, beta2=0.75, eps=1e-3, weight_decay=0.25, grad_clip_norm=2.0
    )


def test_weight_decay_shrinks_the_trained_weights(tmp_path: Path) -> None:
    exported = []
    for decay in (0.0, 0.5):
        folder = tmp_path / str(decay)
        folder.mkdir()
        settings = config(folder, count=2, lora_rank=0, learning_rate=1e-2, weight_decay=decay)
        model = Path(main(settings).export_path)
        exported.append(load_file(model / "model.safetensors"))
    # One step: w1 = w0 (1 - lr λ) + Adam's step, which does not depend on λ.
    name = next(name for name in exported[0] if name.endswith("q_proj.weight"))
    plain, decayed = (weights[name].astype(np.float64) for weights in exported)
    assert np.linalg.norm(decayed) < np.linalg.norm(plain)
    shrunk = (plain - decayed) / 5e-3  # λ lr w0
    np.testing.assert_allclose(
        shrunk, plain, atol=1e-2 + 1e-4
    )  # w0 is w1 but for one step of Adam, at most lr
    assert np.abs(plain).max() > 2e-2


def test_a_run_can_be_started_from_the_settings_that_another_wrote(tmp_path: Path) -> None:
    for rank in (0, 4):
        first = config(tmp_path, lora_rank=rank, lr_scheduler="cosine", eval_fraction=0.3)
        main(first)
        assert Config(**json.loads((tmp_path / "run/config.json").read_text())) == first


@pytest.fixture
def short_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A trainer that takes 40 tokens."""
    catalog = tmp_path / "catalog.yaml"
    shape = "{base_model: '*', mode: LORA_TRAINER, device: cpu, dtype: float32, max_context_length: 40}"
    catalog.write_text(f"shapes:\n  short: {shape}\n")
    monkeypatch.setenv("FIRESTEEL_CATALOG", str(catalog))
    return {"training_shape_id": "short"}


def test_without_a_limit_of_its_own_a_run_drops_what_its_trainer_cannot_take(
    tmp_path: Path, short_trainer: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, trainer=short_trainer)
    with Path(settings.dataset).open("a") as file:
        turns = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        question = [{"role": "user", "content": "A question of many more words than the others?"}]
        file.write(json.dumps({"prompt": question, **turns}) + "\n")
    main(settings)
    assert "6 pairs; 1 dropped" in capsys.readouterr().out
    outcome = json.loads((tmp_path / "run/bad_rows.jsonl").read_text())
    assert outcome["line"] == 7
    assert outcome["reason"].endswith("more than max_seq_len 40")


def test_a_limit_that_the_trainer_cannot_take_is_refused_with_its_own(
    tmp_path: Path, short_trainer: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match=r"holds 40 tokens.*with 41 tokens"):
        main(config(tmp_path, trainer=short_trainer, max_seq_len=41))
    with pytest.raises(ModelError, match=r"tiny-llama takes 8192 tokens, 9000 were asked for.*max_seq_len"):
        main(config(tmp_path, max_seq_len=9000))
    assert not (tmp_path / "run").exists()


def test_a_held_out_file_that_repeats_trained_prompts_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path)
    main(settings.model_copy(update={"eval_dataset": settings.dataset}))
    assert "eval_dataset: 6 held-out rows have a prompt that is trained on" in capsys.readouterr().out


def test_weights_are_exported_before_anything_else_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> list[str]:
        raise OSError("no space left")

    monkeypatch.setattr(Answers, "write_comparison", fail)
    with pytest.raises(OSError, match="no space left"):
        main(config(tmp_path))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_tokens_are_counted_by_the_cookbooks_names(tmp_path: Path) -> None:
    main(config(tmp_path, epochs=2))
    for record in steps(tmp_path / "run"):
        first_epoch = record["train/epoch"] == 1
        assert record["train/ref_tokens"] == (record["train/step_tokens"] if first_epoch else 0)
        assert record["train/total_tokens"] == record["train/step_tokens"] + record["train/ref_tokens"]


@pytest.mark.parametrize("mode", ["upfront", "lazy"])
def test_the_tokens_that_the_reference_read_are_told_apart_from_those_whose_values_were_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))  # an empty cache
    for name in ("first", "second"):
        main(config(tmp_path, log_path=str(tmp_path / name), reference_pass=mode, epochs=2))
    first, second = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    )
    for told in ("train/ref_tokens", "train/total_tokens"):
        assert [record[told] for record in first] == [record[told] for record in second]
    assert first[-1]["reference/tokens"] == sum(record["train/ref_tokens"] for record in first) > 0
    assert [record["reference/tokens"] for record in second] == [0] * len(second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betta": 0.1}, "betta: Config has no such setting"),
        ({"beta": 0}, r"beta: .*greater than 0 \(got 0\)"),
        ({"eval_fraction": 0.1, "eval_dataset": "x"}, "give eval_dataset or eval_fraction, not both"),
        ({"eval_interval": 3}, "eval_interval needs held-out rows"),
        ({"lora_rank": 0, "lora_alpha": 8}, "lora_alpha is not read at lora_rank 0"),
        ({"trainer": {"shape": "x"}}, "TrainerConfig has no such setting|trainer.shape"),
        ({"lr_scheduler": "sometimes"}, "lr_scheduler"),
        ({"beta": math.inf}, "beta: .*finite number"),
        ({"learning_rate": math.nan}, "learning_rate: .*finite number|greater than 0"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"seed": 2**64}, "seed: .*less than"),
        ({"label_smoothing": 0.5}, "label_smoothing: .*less than 0.5"),
        ({"batch_size": 0}, "batch_size: "),
    ],
    ids=[
        *("unknown", "out of range", "two ways", "nothing to evaluate", "unused", "nested", "schedule"),
        *("infinite", "no number", "negative seed", "huge seed", "a coin", "no pairs"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **settings)


def test_settings_that_contradict_each_other_are_not_drowned_in_all_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, eval_interval=3)
    assert len(str(caught.value)) < 100


def test_a_tilde_is_the_users_home_in_yaml_as_in_a_shell(tmp_path: Path) -> None:
    settings = config(tmp_path, log_path="~/runs/x", eval_dataset="~/held.jsonl")
    assert settings.log_path == str(Path.home() / "runs/x")
    assert settings.eval_dataset == str(Path.home() / "held.jsonl")


def test_an_unset_setting_must_be_given() -> None:
    with pytest.raises(ConfigError, match="dataset: must be given"):
        Config(log_path="x", base_model="tiny-llama")  # type: ignore[call-arg]


def test_the_summary_says_what_the_files_say(tmp_path: Path) -> None:
    summary: RunSummary = main(config(tmp_path, count=10, eval_fraction=0.2))
    last = [record for record in records(tmp_path / "run") if "eval/margin" in record][-1]
    assert summary.after == {k.removeprefix("eval/"): v for k, v in last.items() if k.startswith("eval/")}
    assert Path(summary.export_path) == tmp_path / "run/adapter"


def test_a_fast_path_that_differs_ends_the_run_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention._by_segments
    main(config(tmp_path, verify=True))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verify")]
    assert len(said) == 4
    assert all(line.endswith("ok") for line in said)
    monkeypatch.setattr(attention, "_by_segments", lambda *given: right(*given) * 1.0002)
    with pytest.raises(VerificationFailed):
        main(config(tmp_path, verify=True, log_path=str(tmp_path / "other")))
    assert "DIFFERS" in capsys.readouterr().out
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_lazy_reference_gives_the_numbers_of_one_asked_before(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = []
    for mode in ("upfront", "lazy"):
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / mode / "home"))
        (tmp_path / mode).mkdir(exist_ok=True)
        settings = config(
            tmp_path / mode, count=10, lora_rank=rank, epochs=2, eval_fraction=0.2, reference_pass=mode
        )
        summary = main(settings)
        outcomes.append([record["train/dpo_loss"] for record in steps(tmp_path / mode / "run")])
        assert summary.reference_seconds > 0
        # Each of the 10 pairs is computed once; what comes up again, in epoch 2 and after training, is there.
        (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("reference: "))
        assert "from the cache, 10 computed (0 with damaged entries, 0 checked)" in said
    assert outcomes[0] == pytest.approx(outcomes[1], abs=1e-5)
    before = records(tmp_path / "lazy/run")
    main(settings)
    assert records(tmp_path / "lazy/run") == before
    assert "0 computed (0 with damaged entries, 4 checked)" in capsys.readouterr().out


def test_time_spent_waiting_for_rows_is_a_metric(tmp_path: Path) -> None:
    main(config(tmp_path))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["train/data_wait_sec"] >= 0 for line in lines)
