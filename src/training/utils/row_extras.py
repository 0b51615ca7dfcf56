"""What stands in a row beside what it says: it goes along into another form, or the row is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from training.utils.plain_texts import PROMPT_LIKE_KEYS
from training.utils.preference_examples import ExampleError, Tools
from training.utils.preference_sides import Side
from training.utils.ranked_rows import LISTS, ranking_of
from training.utils.row_values import Row, read_number, same_json, shown
from training.utils.sft_data import BESIDE

NewRow: TypeAlias = dict[str, Any]
CHOSEN_SCORE, REJECTED_SCORE = "score_chosen", "score_rejected"
"""Where forms without a place for scores have those of their two answers; public data sets use these names."""

# By form, what its reader reads, or refuses where it is no repetition.
_PAIR = {"chosen", "rejected"}
_SAID_BY_PREFERENCES: dict[str, set[str]] = {
    "messages": {*_PAIR, "prompt", "system"},
    "preferred_output": {"input", "preferred_output", "non_preferred_output"},
    "prompt-messages": {*_PAIR, "prompt", "system"},
    "prompt-text": {*_PAIR, *PROMPT_LIKE_KEYS},
    "message-lists": {*_PAIR, "prompt", "system"},
    "text": {*_PAIR, *PROMPT_LIKE_KEYS},
    "samples": {"samples", *PROMPT_LIKE_KEYS},
    "completions": {"completions", "scores", "ranks", *PROMPT_LIKE_KEYS},
}
_SAID_BY_SUPERVISED_ROWS = {"messages", "conversations", *BESIDE}

_OF_AN_ANSWER = {"messages", "text", "tools"}


def extras_of_supervised(row: Row) -> NewRow:
    """Its keys that no reader reads, and its weight."""
    return _beside(row, _SAID_BY_SUPERVISED_ROWS)


def extras_of_preference(row: Row, form: str, side: Side | None) -> NewRow:
    """Its keys that the reader of its form does not read, and its weight.

    Of one side, also what stands in that side's answer; ExampleError where a list has no one such answer. Otherwise
    raises ExampleError for what stands in an answer: the other form may have no place for it.
    """
    extras = _beside(row, _SAID_BY_PREFERENCES[form])
    if side and any(same_json(row.get("messages"), row.get(name)) for name in _PAIR):
        extras.pop("messages", None)  # public data sets repeat the chosen side so
    for place, key, value in _inside(row, side):
        if side is None:
            told = "has no place in another form; remove it, or put it beside the two sides"
            raise ExampleError(f"{place}.{key}", told)
        if key in extras and not same_json(extras[key], value):
            raise ExampleError(f"{place}.{key}", f"{shown(value)}, and beside the answers another; keep one")
        extras[key] = value
    return extras


def with_extras(new: NewRow, extras: Row) -> NewRow:
    """A new row with what goes along. Raises ExampleError where both have a key, and not the same under it."""
    for key in new.keys() & extras.keys():
        if extras[key] and not same_json(new[key], extras[key]):
            told = "stands beside what the row says, and that form has another meaning for this key"
            raise ExampleError(key, f"{shown(extras[key])} {told}; rename or remove it")
    return new | {key: value for key, value in extras.items() if key not in new}


def scores_of_list(row: Row) -> dict[str, float]:
    """Of the best and the worst answer of a row that lists its answers; nothing of another row."""
    if not row.keys() & {*LISTS}:
        return {}
    ranks = ranking_of(row).ranks
    return {CHOSEN_SCORE: score_of(min(ranks)), REJECTED_SCORE: score_of(max(ranks))}


def says_ranks(row: Row) -> bool:
    """Whether a row that lists its answers has ranks in place of scores: as scores they would be invented."""
    answers = row.get("completions") or ()
    return row.get("ranks") is not None or any(isinstance(a, dict) and "rank" in a for a in answers)


def scores_beside(row: Row) -> dict[str, float]:
    """Of two answers, if the row has scores of both. Raises ExampleError for what is no number."""
    given = {key: row[key] for key in (CHOSEN_SCORE, REJECTED_SCORE) if row.get(key) is not None}
    return {key: read_number(value, key) for key, value in given.items()} if len(given) == 2 else {}


def score_of(rank: float) -> float:
    """Higher is better, and 0 has no sign."""
    return 0.0 - rank


def tools_beside(tools: Tools) -> NewRow:
    """As they stand in a row that has any."""
    return {"tools": list(tools)} if tools else {}


def _beside(row: Row, said: Iterable[str]) -> NewRow:
    return {key: value for key, value in row.items() if key not in {*said, "tools"}}


def _inside(row: Row, side: Side | None) -> Iterator[tuple[str, str, object]]:
    """Place, key and value of what stands in an answer, or in the prompt, beside its messages or its text."""
    holders = {"input": row.get("input")}
    holders |= {name: row.get(name) for name in ("chosen", "rejected") if side in (None, name)}
    for name in row.keys() & {*LISTS}:
        answers = row[name]
        kept = range(len(answers)) if side is None else (ranking_of(row).only(side),)
        holders |= {f"{name}[{index}]": _without_ranking(answers[index], name) for index in kept}
    for place, holder in holders.items():
        if isinstance(holder, dict):
            yield from ((place, key, holder[key]) for key in holder if key not in _OF_AN_ANSWER)


def _without_ranking(answer: object, name: str) -> object:
    """What a listed answer says beside how good it is; nothing where it is a message as it stands."""
    if not isinstance(answer, dict):
        return answer
    evals = answer.get("evals")
    ranking = {"score", *(["rank"] if name == "completions" else [])}
    if evals is None or (isinstance(evals, dict) and evals.keys() <= {"score"}):
        ranking.add("evals")
    said = answer.keys() - {"evals"} if "role" in answer else set()
    return {key: value for key, value in answer.items() if key not in ranking | said}
