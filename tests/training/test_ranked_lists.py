"""Ranked lists: what a row of several answers says, what the losses make of it, and that the prompt is shared once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config, numbers, outcome, write_lists

from firesteel.sdk import DataError, Datum, ModelInput, RowError, TensorData
from training.recipes import orpo_loop
from training.recipes.dpo_loop import main
from training.utils.losses import DpoObjective, PairLogprobs, PairScores, make_pair_loss, score_pairs
from training.utils.pairs import DistinctDatums, PreferencePair, RankedPlace, pairs_of, render_usable
from training.utils.preference_data import read_preferences, read_row
from training.utils.preference_examples import RankedExample
from training.utils.preference_rows import PREFERENCES
from training.utils.reference_pass import NoReferences
from training.utils.rendering import Renderer
from training.utils.row_index import index_rows
from training.utils.row_outcomes import Rendering
from training.utils.row_sets import select_rows

PROMPT = [{"role": "user", "content": "2+2?"}]
TEXTS = ["4", "four", "5"]  # best first
BETA = 0.7


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def read(row: dict[str, Any]) -> RankedExample:
    form, example = read_row(json.dumps(row).encode(), 1)
    assert isinstance(example, RankedExample), form
    return example


FORMS: dict[str, dict[str, Any]] = {
    "scores inside": {
        "prompt": PROMPT,
        "completions": [{"text": t, "score": s} for t, s in zip(TEXTS, (0.9, 0.5, -1), strict=True)],
    },
    "scores inside, the best last": {
        "prompt": PROMPT,
        "completions": [{"text": t, "score": s} for s, t in enumerate(reversed(TEXTS))],
    },
    "ranks inside": {
        "prompt": PROMPT,
        "completions": [{"messages": said(t), "rank": r} for r, t in enumerate(TEXTS, start=1)],
    },
    "scores beside": {"prompt": PROMPT, "completions": TEXTS[::-1], "scores": [1, 2, 3]},
    "ranks beside": {"prompt": PROMPT, "completions": [said(t) for t in TEXTS], "ranks": [1, 2, 3]},
    "messages with ranks": {
        "prompt": PROMPT,
        "completions": [{**said(t)[0], "rank": r} for r, t in enumerate(TEXTS)],
    },
    "samples": {
        "samples": [{"messages": PROMPT + said(t), "score": s} for t, s in zip(TEXTS, (3, 2, 1), strict=True)]
    },
    "samples with evals": {
        "samples": [
            {"messages": PROMPT + said(t), "evals": {"score": s}}
            for t, s in zip(TEXTS, (3, 2, 1), strict=True)
        ]
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_puts_the_highest_score_and_the_lowest_rank_first(name: str) -> None:
    example = read(FORMS[name])
    assert example.prompt == tuple(PROMPT)
    assert [turns[0]["content"] for turns in example.answers] == TEXTS  # type: ignore[index]
    assert example.preferences == [(0, 1), (0, 2), (1, 2)]
    assert example.ties == 0


def test_a_text_prompt_has_text_answers() -> None:
    example = read({"prompt": "2+2=", "completions": TEXTS, "ranks": [1, 2, 3], "weight": 2})
    assert (example.prompt, example.answers, example.weight) == ("2+2=", tuple(TEXTS), 2.0)


def test_tied_answers_prefer_nothing_to_each_other_and_are_counted() -> None:
    example = read({"prompt": "2+2=", "completions": ["5", "4", "four"], "scores": [0, 1, 1]})
    assert example.answers == ("4", "four", "5")
    assert example.preferences == [(0, 2), (1, 2)]
    assert example.ties == 1


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("no prompt", {"completions": TEXTS, "ranks": [1, 2, 3]}, "prompt", "missing"),
    (
        "one answer",
        {"prompt": "a", "completions": ["b"], "ranks": [1]},
        "completions",
        "a list of 1; expected 2",
    ),
    ("no list", {"prompt": "a", "completions": "b"}, "completions", "expected a list of answers"),
    (
        "all tied",
        {"prompt": "a", "completions": TEXTS, "scores": [1, 1, 1]},
        "scores[2]",
        "all 3 answers are equally good",
    ),
    (
        "scores twice",
        {
            "prompt": "a",
            "completions": [{"text": "b", "score": 1}, {"text": "c", "score": 0}],
            "ranks": [1, 2],
        },
        "completions",
        "given more than once",
    ),
    (
        "scores and ranks",
        {"prompt": "a", "completions": TEXTS, "ranks": [1], "scores": [1]},
        "completions",
        "keep one",
    ),
    (
        "too few ranks",
        {"prompt": "a", "completions": TEXTS, "ranks": [1, 2]},
        "ranks",
        "a list of 2; expected a list of 3",
    ),
    (
        "no ranking",
        {"prompt": "a", "completions": TEXTS},
        "completions[0]",
        "each is an object with score or rank",
    ),
    (
        "a rank that is missing",
        {"prompt": "a", "completions": [{"text": "b", "rank": 1}, {"text": "c"}]},
        "completions[1].rank",
        "expected a rank",
    ),
    (
        "NaN",
        {"prompt": "a", "completions": TEXTS, "scores": [1, None, 2]},
        "scores[1]",
        "null; expected a finite number",
    ),
    (
        "identical answers of different ranks",
        {"prompt": "a", "completions": ["b", "b"], "ranks": [1, 2]},
        "answer 2",
        "tokens as answer 1",
    ),
    (
        "an answer of the user",
        {"prompt": PROMPT, "completions": [PROMPT, said("4")], "ranks": [1, 2]},
        "completions[0][0].role",
        "expected 'assistant'",
    ),
    (
        "an answer that is messages and text",
        {
            "prompt": PROMPT,
            "completions": [{"text": "b", "messages": said("c"), "rank": 1}, {"text": "d", "rank": 2}],
        },
        "completions[0]",
        "both messages and text; keep one",
    ),
    (
        "tools of one answer",
        {
            "prompt": PROMPT,
            "completions": [{"text": "b", "tools": [{}], "rank": 1}, {"text": "d", "rank": 2}],
        },
        "completions[0].tools",
        "put them beside the prompt",
    ),
    (
        "a system beside",
        {"prompt": PROMPT, "completions": ["b", "c"], "ranks": [1, 2], "system": "Be short."},
        "system",
        "no turn of the conversations",
    ),
    (
        "a question beside samples",
        {
            "samples": [{"messages": PROMPT + said(t), "score": s} for s, t in enumerate("abc")],
            "question": "why?",
        },
        "question",
        "no turn of the conversations",
    ),
    (
        "too many",
        {"prompt": "a", "completions": [str(i) for i in range(300)], "ranks": list(range(300))},
        "completions",
        "a list of 300; expected 2 to 64",
    ),
]


@pytest.mark.parametrize(("row", "field", "reason"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_list_is_refused_where_and_why(
    tmp_path: Path, row: dict[str, Any], field: str, reason: str
) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(RowError) as caught:
        index_rows(str(path), Renderer.load("tiny-llama"), PREFERENCES)
    assert (caught.value.line, caught.value.field) == (1, field)
    assert reason in caught.value.reason


# Losses. A list of answers with scores s, best first; tied ones share a rank.


def answer(place: int) -> Datum:
    """An answer of one to three tokens after a prompt of three."""
    tokens = [5, 6, 7, *range(10 * (place + 1), 10 * (place + 1) + 1 + place % 3)]
    weights = [0.0] * 2 + [1.0] * (len(tokens) - 3)
    inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(weights, "float32")}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def pairs_of_list(ranks: list[int], line: int, weight: float = 1.0) -> list[PreferencePair]:
    answers = [answer(place) for place in range(len(ranks))]
    better = [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
    return [
        PreferencePair(answers[i], answers[j], 3, line, weight / len(better), RankedPlace(i, len(better)))
        for i, j in better
    ]


def plain_plackett_luce(scores: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Straight from the formula: each answer against itself and all worse ones."""
    stages = []
    for place, rank in enumerate(ranks):
        worse = [other for other, theirs in enumerate(ranks) if theirs > rank]
        if worse:
            rivals = scores[[place, *worse]]
            stages.append(torch.logsumexp(BETA * rivals, 0) - BETA * scores[place])
    return torch.stack(stages).sum()


def plain_all_pairs(scores: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    losses = [
        -torch.nn.functional.logsigmoid(BETA * (scores[i] - scores[j]))
        for i in range(len(ranks))
        for j in range(len(ranks))
        if ranks[i] < ranks[j]
    ]
    return torch.stack(losses).mean()


PLAIN = {"plackett_luce": plain_plackett_luce, "sigmoid": plain_all_pairs}
RANKS = (
    st.lists(st.integers(1, 4), min_size=2, max_size=6).map(sorted).filter(lambda ranks: len(set(ranks)) > 1)
)


@pytest.mark.parametrize("loss", PLAIN)
@given(
    lists=st.lists(st.tuples(RANKS, st.floats(0.1, 3)), min_size=1, max_size=4), seed=st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=60)
def test_value_and_gradient_are_those_of_the_formula_over_the_lists(
    loss: str, lists: list[tuple[list[int], float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [p for line, (ranks, w) in enumerate(lists, start=1) for p in pairs_of_list(ranks, line, w)]
    distinct = DistinctDatums.of(pairs)
    rows = [
        torch.tensor(rng.normal(-2, 1.5, len(d.loss_fn_inputs["weights"].to_numpy())), requires_grad=True)
        for d in distinct.data
    ]
    masks = [torch.tensor(d.loss_fn_inputs["weights"].to_numpy()).double() for d in distinct.data]
    frozen = [torch.tensor(rng.normal(-2, 1.5, int(m.sum()))) for m in masks]
    sides = [frozen[place].numpy() for place in distinct.places]
    references = [PairLogprobs(*sides[i : i + 2]) for i in range(0, len(sides), 2)]
    objective = DpoObjective(BETA, loss=loss)  # type: ignore[arg-type]
    value, metrics = make_pair_loss(pairs, references, objective)(distinct.data, rows)

    scores = [(row * m).sum() - f.sum() for row, m, f in zip(rows, masks, frozen, strict=True)]
    per_list, weights, start = [], [], 0
    for ranks, weight in lists:
        # Answers come in the order in which pairs name them: the first, those it beats, those tied with it.
        named = list(dict.fromkeys(p for pair in _places(ranks) for p in pair))
        own = torch.stack([scores[start + named.index(place)] for place in range(len(ranks))])
        per_list.append(PLAIN[loss](own, ranks) * weight)
        weights.append(weight)
        start += len(named)
    expected = torch.stack(per_list).sum() / sum(weights)
    assert value.item() == pytest.approx(expected.item(), abs=1e-10)
    assert metrics["dpo_loss"] == pytest.approx(expected.item(), abs=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(value, rows), torch.autograd.grad(expected, rows), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def _places(ranks: list[int]) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]


def test_the_pairs_of_a_row_share_its_weight_whatever_their_number() -> None:
    renderer = Renderer.load("tiny-llama")
    weights = []
    for row in (
        {"prompt": "a", "completions": ["b", "c", "d", "e"], "ranks": [1, 2, 3, 4], "weight": 2},
        {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "weight": 2},
    ):
        example = read(row)
        rendered = render_usable(renderer, example)
        weights.append([pair.weight for pair in pairs_of(rendered, example, rendered)])
    assert weights == [[pytest.approx(1 / 3)] * 6, [2.0]]


def test_stages_of_lists_that_are_scored_apart_stay_apart() -> None:
    """Evaluation joins the scores of its batches: a list must not go on in the next one."""
    rng = np.random.default_rng(0)
    lists = [pairs_of_list([1, 2, 3], line) for line in (1, 2, 3)]
    parts = []
    for pairs in lists:
        distinct = DistinctDatums.of(pairs)
        rows = [torch.tensor(rng.normal(-2, 1, d.model_input.length)) for d in distinct.data]
        parts.append(score_pairs(pairs, rows, NoReferences().of(pairs)))
    objective = DpoObjective(BETA, loss="plackett_luce")
    joined = objective.metrics(PairScores.joined(parts))["dpo_loss"]
    assert joined == pytest.approx(
        np.mean([objective.metrics(part)["dpo_loss"] for part in parts]), abs=1e-12
    )


def test_the_longest_answer_decides_whether_a_list_fits(tmp_path: Path) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completions": ["b", "c", "d" * 40], "ranks": [1, 2, 3]}))
    renderer = Renderer.load("tiny-llama")
    index = index_rows(str(path), renderer, PREFERENCES)
    with pytest.raises(DataError, match="another answer has 42 tokens, more than max_seq_len 10"):
        select_rows(index, renderer, Rendering(10))


def test_a_checkpoint_keeps_what_the_reference_says_of_a_few_pairs_only(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    data = write_lists(tmp_path / "lists.jsonl", 9, extra=("no", "never", "nothing"))
    main(settings.model_copy(update={"dataset": data}))
    notes = json.loads((tmp_path / "run/checkpoints/step-1/notes.json").read_text())
    assert len(notes["reference"]["probes"]) == 2 * 8


def test_plackett_luce_of_two_answers_is_the_sigmoid_loss_to_the_bit() -> None:
    pairs = pairs_of_list([1, 2], 1)
    rows = [torch.tensor([-1.0, -2.0, -0.3]), torch.tensor([-1.0, -2.0, -0.7, -4.0])]
    references = [PairLogprobs(np.array([-0.5]), np.array([-0.25, -1.0]))]
    one, other = (
        make_pair_loss(pairs, references, DpoObjective(BETA, loss=loss))([], rows)[0]  # type: ignore[arg-type]
        for loss in ("sigmoid", "plackett_luce")
    )
    assert one.item() == other.item()


def test_plackett_luce_stays_finite_far_from_the_order() -> None:
    pairs = pairs_of_list([1, 2, 3], 1)
    distinct = DistinctDatums.of(pairs)
    rows = [
        torch.full((d.model_input.length,), -1e4 * (3 - n), requires_grad=True)
        for n, d in enumerate(distinct.data)
    ]
    zeros = [
        PairLogprobs(*(np.zeros(int(d.loss_fn_inputs["weights"].to_numpy().sum())) for d in p.datums))
        for p in pairs
    ]
    value, _ = make_pair_loss(pairs, zeros, DpoObjective(BETA, loss="plackett_luce"))(distinct.data, rows)
    assert math.isfinite(value.item())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, rows))


# Runs on a real (tiny) model


@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce", "sigmoid_norm"])
def test_a_run_on_ranked_lists_learns_their_order_and_counts_the_ties(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    chosen = config(
        tmp_path, loss=loss, epochs=4, eval_fraction=0.3, beta=2.0 if loss == "sigmoid_norm" else 0.1
    )
    summary = main(chosen.model_copy(update={"dataset": write_lists(tmp_path / "lists.jsonl", 9)}))
    assert summary.after["dpo_loss"] < summary.before["dpo_loss"]
    assert summary.after["accuracy"] > 0.9
    # Six rows of three preferences, three with a tie.
    printed = capsys.readouterr().out
    assert "24 pairs (of 9 ranked lists; 3 ties dropped)" in printed
    assert "no row has more than two answers" not in printed


@pytest.mark.parametrize(("loss", "told"), [("plackett_luce", 1), ("sigmoid", 0)])
def test_the_loss_of_lists_on_rows_of_two_answers_is_said_to_be_sigmoid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str, told: int
) -> None:
    main(config(tmp_path, loss=loss))
    said = "warning: loss plackett_luce: no row has more than two answers; of two it is the same as sigmoid"
    assert capsys.readouterr().out.splitlines().count(said) == told


def test_orpo_takes_ranked_lists_as_all_their_pairs(tmp_path: Path) -> None:
    data = write_lists(tmp_path / "lists.jsonl", 6)
    summary = orpo_loop.main(
        orpo_loop.Config(
            log_path=str(tmp_path / "run"), base_model="tiny-llama", dataset=data, lora_rank=4, learning_rate=3e-3,
            epochs=6, batch_size=2, eval_fraction=0.2,
        )
    )  # fmt: skip
    assert summary.after["orpo_loss"] < summary.before["orpo_loss"]


def test_a_list_trains_as_its_pairs_do_and_reads_its_prompt_once(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists.jsonl", 2, extra=("no", "never"))
    rows = []
    for example in read_preferences(lists).examples:
        assert isinstance(example, RankedExample)
        rows += [
            {"prompt": example.prompt, "chosen": example.answers[i], "rejected": example.answers[j]}
            for i, j in example.preferences
        ]
    (tmp_path / "expanded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == 20
    common = {"shuffle": False, "lora_rank": 4, "learning_rate": 3e-3}
    of_lists = config(tmp_path, log_path=str(tmp_path / "a"), batch_size=1, **common)
    of_pairs = config(tmp_path, log_path=str(tmp_path / "b"), batch_size=10, **common)
    main(of_lists.model_copy(update={"dataset": lists}))
    main(of_pairs.model_copy(update={"dataset": str(tmp_path / "expanded.jsonl")}))
    for ours, theirs in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        for name in ("train/dpo_loss", "train/margin", "train/accuracy", "train/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
        # 5 answers and one prompt, not 20 sides and 10 prompts.
        assert ours["train/step_tokens"] * 4 == theirs["train/step_tokens"]
        assert ours["train/computed_tokens"] == theirs["train/computed_tokens"]
        assert ours["train/computed_tokens"] < 0.6 * ours["train/step_tokens"]


def test_a_stopped_run_on_lists_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_lists(tmp_path / "lists.jsonl", 6)
    results = []
    for name, epochs in (("whole", (3,)), ("in parts", (1, 3))):
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / name / "home"))
        settings = config(tmp_path / name, loss="plackett_luce", dcp_save_interval=1, eval_fraction=0.2)
        for count in epochs:
            main(settings.model_copy(update={"dataset": data, "epochs": count}))
        results.append(outcome(settings))
    assert results[0]["metrics"][-1] == results[1]["metrics"][-1]
    assert results[0]["weights"] == results[1]["weights"]
