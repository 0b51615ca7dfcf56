"""Rows that are preferences: a row makes a pair, or where it ranks more answers than two, several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np

from firesteel.sdk.types import IntArray
from training.utils.data_findings import DataFinding, findings_of_preferences
from training.utils.jsonl import LocatedRow
from training.utils.pairs import PreferencePair, pairs_of, render_usable, shortened_or_dropped
from training.utils.preference_data import FORMATS, read_row
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    Messages,
    PreferenceExample,
    RankedExample,
    TextExample,
)
from training.utils.rendering import RenderedAnswers, Renderer
from training.utils.row_check import RecordedRow
from training.utils.row_outcomes import Rendering, RowOutcome
from training.utils.row_records import (
    CHECKED,
    PLACE,
    KeptRows,
    RankedAnswer,
    RowArray,
    json_key,
    ordered_key,
    tokens_key,
)
from training.utils.row_signs import RenderedTurns, Sign, said, signs_of, signs_of_preference
from training.utils.tokenizer import Tokens, shared_length
from training.utils.words import counted


@dataclass(frozen=True)
class RenderedPreferences:
    """See `row_check.RenderedRow`."""

    form: str
    offset: int
    example: PreferenceExample
    rendered: RenderedAnswers
    signs: Sign

    @property
    def record(self) -> tuple[int, ...]:
        """See `PreferenceRows.record_type`."""
        prompt_len = self.rendered.prompt_len
        answers = [side.tokens for side in self.answers.sides.values()]
        keys = self._answer_keys
        place = (self.offset, tokens_key(answers[0][:prompt_len]), self.example.line, prompt_len)
        checked = (ordered_key(keys), sum(map(len, answers)), saved_by_sharing(answers), int(self.signs))
        lengths = len(answers[0]), max(map(len, answers[1:]))
        made = len(self.rendered.preferences), self.rendered.ties
        return (*place, *checked, *lengths, *made, ordered_key(keys[::-1]))

    @property
    def ranked(self) -> Sequence[RankedAnswer]:
        """See `row_check.RenderedRow`."""
        return _ranked(self.example, self._answer_keys, list(self.rendered.lengths.values()))

    @cached_property
    def _answer_keys(self) -> list[int]:
        prompt_len = self.rendered.prompt_len
        return [tokens_key(side.tokens[prompt_len:]) for side in self.rendered.sides.values()]

    @property
    def answers(self) -> RenderedAnswers:
        """See `row_check.RenderedRow`."""
        return self.rendered

    def items(self, rules: Rendering) -> list[PreferencePair]:
        """Its pairs."""
        rendered = self.rendered
        if rules.too_long(rendered.lengths):
            fitted, _ = shortened_or_dropped(rendered, rules, self.example.line)
            assert fitted is not None, "rows that cannot be shortened are in no set"
            rendered = fitted
        return pairs_of(rendered, self.example, self.rendered)

    def outcome(self, rules: Rendering) -> RowOutcome:
        """See `row_check.RenderedRow`."""
        return shortened_or_dropped(self.rendered, rules, self.example.line)[1]


class PreferenceRows:
    """See `row_check.RowKind`."""

    name = "preferences"
    rows = "preferences"
    item = "pair"
    advice = (
        "train on these with `firesteel dpo` or `firesteel orpo`, or make supervised rows of them with "
        "`firesteel data convert --side chosen`"
    )
    shapes: Sequence[str] = tuple(form.shape for form in FORMATS)
    record_type: np.dtype[np.void] = np.dtype(
        [
            *PLACE,
            *CHECKED,
            ("chosen", "<u4"),  # tokens of the whole side; of a list, its best answer
            ("rejected", "<u4"),  # of a list, the longest of the others
            ("pairs", "<u2"),  # that the row makes
            ("ties", "<u2"),  # twos of its answers between which nothing is preferred
            ("turned", "<u8"),  # as `content`, of the answers in the opposite order
        ]
    )
    code: Sequence[str] = (
        "plain_texts",
        "ranked_rows",
        "preference_data",
        "pairs",
        "row_signs",
        "preference_rows",
    )

    def render(self, row: LocatedRow, renderer: Renderer) -> RenderedPreferences:
        """See `row_check.RowKind`."""
        form, example = read_row(row.raw, row.line)
        rendered = render_usable(renderer, example)
        asked, answers = prompt_and_answers(example)
        sides = [side.tokens for side in rendered.sides.values()]
        prompt = RenderedTurns(_messages(asked), sides[0][: rendered.prompt_len])
        turns = [RenderedTurns(_messages(answer), side) for answer, side in zip(answers, sides, strict=True)]
        signs = signs_of(sides, prompt, turns, renderer)
        signs |= signs_of_preference(row, said(answers[0]), said(answers[-1]))
        return RenderedPreferences(form, row.offset, example, rendered, signs)

    def in_characters(self, row: LocatedRow) -> RecordedRow:
        """See `row_check.RowKind`."""
        form, example = read_row(row.raw, row.line)
        asked, answers = prompt_and_answers(example)
        prompt, texts = said(asked), [said(answer) for answer in answers]
        if isinstance(example, TextExample):
            asked = prompt = texts[0][: shared_length(*texts)]
            texts = [text[len(prompt) :] for text in texts]
            answers = tuple(texts)
        tools = example.tools if isinstance(example, ChatExample | RankedExample) else None
        whole = [prompt + text for text in texts]
        pairs, ties = 1, 0
        if isinstance(example, RankedExample):
            pairs, ties = len(example.preferences), example.ties
        place = (row.offset, json_key([asked, tools]), row.line, len(prompt))
        signs = int(signs_of_preference(row, texts[0], texts[-1]))
        keys = [json_key(answer) for answer in answers]
        if isinstance(example, RankedExample):
            _refuse_same_answers(example, keys)
        checked = (ordered_key(keys), sum(map(len, whole)), saved_by_sharing(whole), signs)
        lengths = len(whole[0]), max(map(len, whole[1:]))
        record = (*place, *checked, *lengths, pairs, ties, ordered_key(keys[::-1]))
        return RecordedRow(form, record, _ranked(example, keys, list(map(len, whole))))

    def lengths(self, record: np.void) -> dict[str, int]:
        """See `row_check.RowKind`."""
        names = ("chosen", "rejected")
        if record["pairs"] + record["ties"] > 1:
            names = ("the best answer", "another answer")
        return dict(zip(names, (int(record["chosen"]), int(record["rejected"])), strict=True))

    def longest(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        longest: IntArray = np.maximum(records["chosen"], records["rejected"]).astype(np.int64)
        return longest

    def parts(self, records: RowArray, longest: int | None) -> dict[str, IntArray]:
        """Of a list, its best answer and the longest of the others."""
        prompt = records["prompt_len"].astype(np.int64)
        behind = {side: _cut(records[side], longest) - prompt for side in ("chosen", "rejected")}
        return {"prompt": prompt, **behind}

    def computed(self, records: RowArray, longest: int | None) -> IntArray:
        """See `row_check.RowKind`.

        Of lists over the limit only the longest answers' lengths are known: all are taken to be cut in proportion.
        """
        tokens, saved = records["tokens"].astype(np.int64), records["saved"].astype(np.int64)
        if longest is None:
            return tokens - saved
        share = np.minimum(longest / self.longest(records), 1)
        two = records["pairs"] + records["ties"] == 1
        of_two = _cut(records["chosen"], longest) + _cut(records["rejected"], longest)
        computed: IntArray = np.where(
            two, of_two - np.minimum(saved, longest), (tokens - saved) * share
        ).astype(np.int64)
        return computed

    def findings(self, rows: KeptRows) -> Iterator[DataFinding]:
        """See `row_check.RowKind`."""
        return findings_of_preferences(rows)

    def counts(self, records: RowArray) -> IntArray:
        """See `row_check.RowKind`."""
        counts: IntArray = records["pairs"].astype(np.int64)
        return counts

    def made(self, records: RowArray, rules: Rendering) -> str:
        """See `row_check.RowKind`."""
        pairs, ties = int(records["pairs"].sum()), int(records["ties"].sum())
        lists = int((records["pairs"] + records["ties"] > 1).sum())
        among = f" (of {counted(lists, 'ranked list')}; {counted(ties, 'tie')} dropped)" if lists else ""
        return f"{pairs:,} pairs{among}"


Text = TypeVar("Text", Tokens, str)


def saved_by_sharing(answers: Sequence[Text]) -> int:
    """How many of the tokens need not be computed, since another answer begins with them."""
    return sum(shared_length(one, other) for one, other in pairwise(sorted(answers)))


def prompt_and_answers(example: PreferenceExample) -> tuple[Messages | str, tuple[Messages | str, ...]]:
    """What is asked, and what is answered, best first. Of two whole texts nothing is known to be asked."""
    if isinstance(example, RankedExample):
        return example.prompt, example.answers
    prompt = "" if isinstance(example, TextExample) else example.prompt
    return prompt, (example.chosen, example.rejected)


def _ranked(example: PreferenceExample, keys: Sequence[int], lengths: Sequence[int]) -> list[RankedAnswer]:
    if len(keys) == 2 or not isinstance(example, RankedExample):
        return []
    places = {rank: place for place, rank in enumerate(sorted(set(example.ranks)))}
    answers = zip(example.ranks, keys, lengths, strict=True)
    return [RankedAnswer(places[rank], key, length) for rank, key, length in answers]


def _refuse_same_answers(example: RankedExample, keys: Sequence[int]) -> None:
    """As `pairs` does with tokens."""
    for better, worse in example.preferences:
        if keys[better] == keys[worse]:
            raise ExampleError(
                f"answer {worse + 1}", f"the same as answer {better + 1}: there is nothing to prefer"
            )


def _messages(turns: Messages | str) -> Messages:
    return () if isinstance(turns, str) else turns


def _cut(lengths: IntArray, longest: int | None) -> IntArray:
    cut: IntArray = np.minimum(lengths.astype(np.int64), longest or np.iinfo(np.int64).max)
    return cut


PREFERENCES = PreferenceRows()
