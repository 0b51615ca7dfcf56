"""Answers with scores or ranks: rows from which preferences are drawn, two answers or more.

A higher `score` is better, a lower `rank` is better (1 is the best). Answers of one score are tied: between them
nothing is preferred.

``{"prompt": …, "completions": […]}``: the prompt is a text or a list of messages; a completion is a text, a list of
messages, or an object with `text` or `messages` and its `score` or `rank`. These may also stand beside the completions,
as `scores` or `ranks`. ``{"samples": […]}``: whole conversations or texts with `score` (or `evals.score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.utils.conversations import (
    Conversation,
    one_turn,
    read_conversation,
    read_response,
    read_tools,
    refuse_what_messages_leave_out,
    split_conversations,
    without_weight,
)
from training.utils.plain_texts import (
    read_text,
    read_whole_text,
    refuse_same_texts,
    refuse_what_text_leaves_out,
)
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    PreferenceExample,
    RankedExample,
    TextExample,
    Tools,
)
from training.utils.row_values import Row, keys_found, outer_form, read_number, required, shown

MOST_ANSWERS = 64
"""Their pairs, which grow with the square, are checked and summed one by one."""
BESIDE = ("system", "input", "instruction", "question", "query", "history", "context")
"""What would be left out beside messages, unless it is one of them."""
RANKED_BY = ("score", "rank", "evals")
LISTS = ("samples", "completions")
"""Keys under which answers stand."""


@dataclass(frozen=True)
class Ranking:
    """How the answers of a row compare: for each a number, smaller is better, and where it stands."""

    ranks: tuple[float, ...]
    places: tuple[str, ...]

    @property
    def order(self) -> list[int]:
        """Places of the answers, best first; tied ones as they stand."""
        return sorted(range(len(self.ranks)), key=self.ranks.__getitem__)

    def refuse_all_tied(self) -> None:
        """Raise ExampleError where nothing is preferred to anything."""
        if len(set(self.ranks)) == 1:
            many = "both" if len(self.ranks) == 2 else f"all {len(self.ranks)}"
            raise ExampleError(self.places[-1], f"a tie: {many} answers are equally good")

    def only(self, side: Literal["chosen", "rejected"]) -> int:
        """Place of the answer that is better than all others, or worse. Raises ExampleError where several are."""
        wanted, name = (min(self.ranks), "best") if side == "chosen" else (max(self.ranks), "worst")
        first, *others = (index for index, rank in enumerate(self.ranks) if rank == wanted)
        if others:
            raise ExampleError(
                self.places[others[0]],
                f"a tie: {1 + len(others)} answers are the {name}, and one alone can be taken; rank one of them apart",
            )
        return first


def ranking_of(row: Row) -> Ranking:
    """How the answers of a row that lists them compare. Raises ExampleError."""
    return _by_score(row["samples"]) if "samples" in row else _ranking(row, row["completions"])


def read_samples(row: Row, line: int) -> PreferenceExample:
    """Whole conversations, or whole texts, with scores. Raises ExampleError."""
    samples = row["samples"]
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ExampleError("samples", f"{shown(samples)}; expected a list of objects")
    _refuse_count("samples", samples)
    ranking = _by_score(samples)
    ranking.refuse_all_tied()
    forms = {outer_form(sample) for sample in samples}
    if forms == {"an object with messages"}:
        conversations = [
            read_conversation(sample["messages"], f"samples[{index}].messages")
            for index, sample in enumerate(samples)
        ]
        refuse_what_messages_leave_out(row, conversations[0].messages, "prompt", *BESIDE)
        tools = read_tools(row, *((f"samples[{index}]", sample) for index, sample in enumerate(samples)))
        return _ranked_conversations(conversations, ranking, tools, line)
    if forms == {"text"} and len(samples) == 2:
        best, worst = ranking.order
        chosen, rejected = (read_whole_text(samples[index], f"samples[{index}]") for index in (best, worst))
        _refuse_beside_whole_texts(row, chosen, rejected)
        refuse_same_texts(chosen, rejected, f"samples[{worst}]")
        return TextExample(chosen, rejected, line)
    if forms == {"text"}:
        raise ExampleError(
            "samples", "more than two whole texts; give their prompt apart: `prompt` and `completions`"
        )
    raise ExampleError("samples", f"{' and '.join(sorted(forms))}; expected messages in all or text in all")


def _refuse_beside_whole_texts(row: Row, *texts: str) -> None:
    """A prompt beside them may only repeat how they begin."""
    refuse_what_text_leaves_out(row)
    prompt = row.get("prompt")
    if prompt and not (isinstance(prompt, str) and all(text.startswith(prompt) for text in texts)):
        raise ExampleError(
            "prompt",
            f"{shown(prompt)} beside whole texts that do not begin with it; give them as `completions`",
        )


def read_completions(row: Row, line: int) -> RankedExample:
    """Answers to one prompt that stands apart, with scores or ranks. Raises ExampleError."""
    prompt, completions = required(row, "prompt"), row["completions"]
    if not isinstance(completions, list):
        raise ExampleError("completions", f"{shown(completions)}; expected a list of answers")
    _refuse_count("completions", completions)
    ranking = _ranking(row, completions)
    ranking.refuse_all_tied()
    order, ranks = ranking.order, sorted(ranking.ranks)
    if isinstance(prompt, str):
        refuse_what_text_leaves_out(row)
        texts = [read_whole_text(completions[index], f"completions[{index}]") for index in order]
        return RankedExample(read_text(prompt, "prompt"), tuple(texts), tuple(ranks), None, line)
    asked = read_conversation(prompt, "prompt")
    answers = [asked + _answer_turns(completions[index], f"completions[{index}]") for index in order]
    tools = read_tools(row)
    refuse_what_messages_leave_out(row, asked.messages, *BESIDE)
    _shared_prompt(answers, tools, line)
    return _list(answers, len(asked.messages), tuple(ranks), tools, line)


def _refuse_count(key: str, answers: Sequence[object]) -> None:
    if not 2 <= len(answers) <= MOST_ANSWERS:
        raise ExampleError(key, f"a list of {len(answers)}; expected 2 to {MOST_ANSWERS} answers")


def _ranked_conversations(
    conversations: Sequence[Conversation], ranking: Ranking, tools: Tools, line: int
) -> ChatExample | RankedExample:
    ordered = [conversations[index] for index in ranking.order]
    if len(ordered) == 2:
        return split_conversations(ordered[0], ordered[1], tools, line)
    start = _shared_prompt(ordered, tools, line)
    return _list(ordered, start, tuple(sorted(ranking.ranks)), tools, line)


def _shared_prompt(answers: Sequence[Conversation], tools: Tools, line: int) -> int:
    """Number of messages that all of these, best first, share as their prompt. Raises ExampleError as for pairs."""
    best = answers[0]
    others = [answer for answer in answers[1:] if answer.messages != best.messages]
    pairs = [split_conversations(best, other, tools, line) for other in others]
    return min((len(pair.prompt) for pair in pairs), default=len(best.messages) - 1)


def _list(
    answers: Sequence[Conversation], start: int, ranks: tuple[float, ...], tools: Tools, line: int
) -> RankedExample:
    prompt, *turns = (
        tuple(without_weight(turn) for turn in turns)
        for turns in (answers[0].messages[:start], *(answer.messages[start:] for answer in answers))
    )
    return RankedExample(prompt, tuple(turns), ranks, tools, line)


def _answer_turns(value: object, place: str) -> Conversation:
    """One answer: a list of messages, one message, a text, or an object with messages or a text."""
    if isinstance(value, dict) and "role" in value:
        message = {name: item for name, item in value.items() if name not in RANKED_BY}
        return read_response([message], place)
    if isinstance(value, dict):
        given = [name for name in ("messages", "text") if name in value]
        if len(given) > 1:
            raise ExampleError(place, "both messages and text; keep one")
        if value.get("tools"):
            raise ExampleError(
                f"{place}.tools", "tools of one answer; put them beside the prompt, for all of them"
            )
        name = given[0] if given else "text"
        return _answer_turns(required(value, name, place), f"{place}.{name}")
    return one_turn("assistant", value, place) if isinstance(value, str) else read_response(value, place)


def _ranking(row: Row, completions: Sequence[object]) -> Ranking:
    """By `scores` or `ranks` beside the completions, or by `score` or `rank` in each."""
    beside = [name for name in ("scores", "ranks") if row.get(name) is not None]
    inside = [c for c in completions if isinstance(c, dict) and c.keys() & {*RANKED_BY}]
    if len(beside) > 1 or (beside and inside):
        raise ExampleError("completions", "scores and ranks are given more than once; keep one of them")
    if not beside:
        return _ranking_inside(completions)
    (name,) = beside
    given = row[name]
    if not isinstance(given, list) or len(given) != len(completions):
        raise ExampleError(
            name, f"{shown(given)}; expected a list of {len(completions)}, one for each completion"
        )
    places = tuple(f"{name}[{index}]" for index in range(len(given)))
    numbers = [read_number(value, place) for value, place in zip(given, places, strict=True)]
    return Ranking(tuple(-n for n in numbers) if name == "scores" else tuple(numbers), places)


def _ranking_inside(completions: Sequence[object]) -> Ranking:
    objects = []
    for index, completion in enumerate(completions):
        if not isinstance(completion, dict):
            raise ExampleError(
                f"completions[{index}]",
                f"{shown(completion)}; without scores or ranks beside them, each is an object with score or rank",
            )
        objects.append(completion)
    if not any("rank" in completion for completion in objects):
        return _by_score(objects, "completions")
    places = tuple(f"completions[{index}].rank" for index in range(len(objects)))
    ranks = []
    for completion, place in zip(objects, places, strict=True):
        if "rank" not in completion or "score" in completion:
            raise ExampleError(
                place, f"{keys_found(completion)}; expected a rank, and no score, in each of them"
            )
        ranks.append(read_number(completion["rank"], place))
    return Ranking(tuple(ranks), places)


def _by_score(answers: Sequence[Row], key: str = "samples") -> Ranking:
    scores = tuple(_score(answer, f"{key}[{index}]") for index, answer in enumerate(answers))
    places = tuple(f"{key}[{index}].score" for index in range(len(answers)))
    return Ranking(tuple(-score for score in scores), places)


def _score(answer: Row, place: str) -> float:
    evals = answer.get("evals")
    nested = evals.get("score") if isinstance(evals, dict) else None
    score = answer.get("score", nested)
    if score is None:
        raise ExampleError(f"{place}.score", f"missing; {keys_found(answer)}; expected score or evals.score")
    if nested is not None and nested != score:
        raise ExampleError(f"{place}.score", f"{shown(score)}, but evals.score is {shown(nested)}; keep one")
    return read_number(score, f"{place}.score")
