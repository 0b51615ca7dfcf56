"""A chosen and a rejected datum that share a prompt: what preference losses are computed on.

For a sequence ``t[0..n-1]`` a datum holds ``model_input = t[:-1]``, ``target_tokens = t[1:]`` and
``weights``, where ``weights[j]`` is 1 if ``t[j+1]`` is scored. With a prompt of p tokens the first response
token is ``t[p]``: its weight is ``weights[p-1]``.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np

from firesteel.sdk.errors import ConfigError, RowError
from firesteel.sdk.types import Datum, FloatArray, ModelInput, TensorData
from training.utils.preference_data import PreferenceFile
from training.utils.preference_examples import ExampleError, PreferenceExample
from training.utils.rendering import RenderedAnswers, RenderedPair, RenderedSide, Renderer
from training.utils.row_forms import refuse_rows
from training.utils.row_outcomes import Rendering, RowCounts, RowOutcome, refuse_limit, refuse_most
from training.utils.tokenizer import Tokens, shared_length


@dataclass(frozen=True)
class RankedPlace:
    """Where a pair stands among the pairs that one row makes: a ranked list of answers makes several."""

    better: int = 0
    """Place of its chosen answer among the row's, best first."""
    pairs: int = 1
    """How many pairs the row makes."""


@dataclass(frozen=True)
class PreferencePair:
    """Two datums that start with the same `prompt_len` tokens and differ after them.

    `line` is that of the row in its file, from 1. Raises DataError for anything else, so that no loss can
    meet a pair without a prompt, without a response, without a scored token or without a difference.
    """

    chosen: Datum
    rejected: Datum
    prompt_len: int
    line: int
    weight: float = 1.0
    """How much it counts in the loss of its step."""
    ranked: RankedPlace = RankedPlace()
    """Where it stands among the pairs of its row."""
    source: str | None = None
    """Where its row says that it is from."""
    truncated: bool = False
    """Whether a side lost the end of its response."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ExampleError("weight", f"{self.weight!r}; expected a number above 0")
        chosen, rejected = _sequence("chosen", self.chosen), _sequence("rejected", self.rejected)
        masks = [np.append(np.float32(0), _weights(datum)) for datum in (self.chosen, self.rejected)]
        _refuse_unusable(RenderedPair(self.prompt_len, chosen, rejected, masks[0], masks[1]))

    @property
    def datums(self) -> tuple[Datum, Datum]:
        """Chosen, then rejected."""
        return self.chosen, self.rejected

    @property
    def tokens(self) -> int:
        """Number of tokens of both whole sequences, the prompt counted on each side."""
        return self.chosen.model_input.length + self.rejected.model_input.length + 2


@dataclass(frozen=True)
class RenderedPairs:
    """The pairs of a file in its order, and every row that was refused, dropped or shortened.

    `not_used` counts the rows left over once `max_pairs` were found.
    """

    file: PreferenceFile
    pairs: tuple[PreferencePair, ...]
    dropped: tuple[RowOutcome, ...]
    not_used: int = 0

    @property
    def summary(self) -> str:
        """See `RowCounts.summary`."""
        counts = RowCounts(self.file.rows, Counter(row.outcome for row in self.dropped), self.not_used)
        return counts.summary(self.file.path, self.file.format, f"{len(self.pairs):,} pairs")


def build_dpo_datums(
    chosen_tokens: Sequence[int],
    rejected_tokens: Sequence[int],
    prompt_len: int,
    max_seq_len: int | None = None,
    truncate: Literal["response_end"] | None = None,
) -> tuple[Datum, Datum]:
    """The chosen and the rejected datum of two whole sequences that share their first `prompt_len` tokens.

    Each is shifted by one; `weights` are 0 for the first ``prompt_len - 1`` targets and 1 after them. A side
    of more than `max_seq_len` tokens is refused, or with ``truncate="response_end"`` loses the end of its
    response. Raises DataError that names lengths and positions.
    """
    if truncate not in (None, "response_end"):
        raise ConfigError(f"truncate: {truncate!r} is neither None nor 'response_end'")
    refuse_limit(max_seq_len)
    sides = {
        name: _scored_from(prompt_len, _token_ids(name, tokens))
        for name, tokens in (("chosen", chosen_tokens), ("rejected", rejected_tokens))
    }
    rendered = RenderedAnswers(prompt_len, sides)
    _refuse_unusable_answers(rendered)
    if max_seq_len is not None and (too_long := Rendering(max_seq_len).too_long(rendered.lengths)):
        if truncate is None:
            raise ExampleError("max_seq_len", f'{too_long}; cut responses with truncate="response_end"')
        rendered = _shortened(rendered, max_seq_len)
    chosen, rejected = (datum_of(side.tokens, side.mask) for side in rendered.sides.values())
    return chosen, rejected


def render_pairs(
    file: PreferenceFile,
    renderer: Renderer,
    rules: Rendering | None = None,
    max_pairs: int | None = None,
) -> RenderedPairs:
    """The pairs of a file's examples, at most `max_pairs` of them, all in memory (recipes: `row_sets`).

    Rows in which a side is longer than the rules allow are dropped, or with ``truncate="response_end"``
    shortened at the end of the response. Examples that cannot be rendered are refused: all at once by an
    error (`"fail"`), or listed beside the reader's own bad rows (`"skip"`). Raises DataError if no pair is
    left.
    """
    refuse_most(max_pairs, "pair")
    rules = rules or Rendering()
    pairs: list[PreferencePair] = []
    refused: list[RowError] = []
    outcomes: list[RowOutcome] = []
    used = made = 0
    for example in file.examples:
        if made == max_pairs:
            break
        used += 1
        try:
            rendered = render_usable(renderer, example)
        except ExampleError as error:
            refused.append(error.at(file.path, example.line))
            continue
        fitted, outcome = _fitted(rendered, rules, example.line)
        outcomes += [outcome] if outcome else []
        pairs += pairs_of(fitted, example, rendered) if fitted else []
        made += fitted is not None
    if rules.on_bad_row == "fail":
        refuse_rows(file.path, refused, len(refused))
    outcomes += [
        RowOutcome(bad.line, "refused", f"{bad.field}: {bad.reason}") for bad in (*file.bad, *refused)
    ]
    outcomes.sort(key=lambda outcome: outcome.line)
    if not pairs:
        counts = RowCounts(file.rows, Counter(row.outcome for row in outcomes), 0)
        raise counts.nothing_left(file.path, outcomes)
    return RenderedPairs(file, tuple(pairs), tuple(outcomes), len(file.examples) - used)


def render_usable(renderer: Renderer, example: PreferenceExample) -> RenderedAnswers:
    """The tokens of an example, whatever their number. Raises ExampleError where they are no pairs."""
    rendered = renderer.render_answers(example)
    _refuse_unusable_answers(rendered)
    return rendered


def pairs_of(
    rendered: RenderedAnswers, example: PreferenceExample, whole: RenderedAnswers
) -> list[PreferencePair]:
    """The pairs of a row whose tokens fit, perhaps only since they were cut from the `whole`.

    An answer is one datum, whatever its pairs, which share the row's weight.
    """
    cut = [rendered.lengths[name] < tokens for name, tokens in whole.lengths.items()]
    datums = [datum_of(side.tokens, side.mask) for side in rendered.sides.values()]
    count = len(rendered.preferences)
    return [
        PreferencePair(
            datums[better],
            datums[worse],
            rendered.prompt_len,
            example.line,
            example.weight / count,
            RankedPlace(better, count),
            example.source,
            cut[better] or cut[worse],
        )
        for better, worse in rendered.preferences
    ]


@dataclass(frozen=True)
class DistinctDatums:
    """The datums of some pairs, each once: what is computed; and for each side of each pair its place among them."""

    data: list[Datum]
    places: list[int]
    """Chosen, rejected, chosen, …."""

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair]) -> DistinctDatums:
        """By identity: pairs of one row share the answers that they have in common."""
        data: list[Datum] = []
        place_of: dict[int, int] = {}
        places = []
        for datum in (datum for pair in pairs for datum in pair.datums):
            if id(datum) not in place_of:
                place_of[id(datum)] = len(data)
                data.append(datum)
            places.append(place_of[id(datum)])
        return cls(data, places)


def _fitted(
    rendered: RenderedAnswers, rules: Rendering, line: int
) -> tuple[RenderedAnswers | None, RowOutcome | None]:
    """The answers as they fit the limit, or None; and what had to be done to them, if anything."""
    too_long = rules.too_long(rendered.lengths)
    if not too_long:
        return rendered, None
    if rules.truncate == "drop":
        return None, RowOutcome(line, "dropped", too_long)
    return shortened_or_dropped(rendered, rules, line)


def shortened_or_dropped(
    rendered: RenderedAnswers, rules: Rendering, line: int
) -> tuple[RenderedAnswers | None, RowOutcome]:
    """Answers over the limit without their ends, or None where that leaves not every pair."""
    too_long = rules.too_long(rendered.lengths)
    assert rules.max_seq_len is not None
    try:
        return _shortened(rendered, rules.max_seq_len), RowOutcome(line, "shortened", too_long)
    except ExampleError as error:
        return None, RowOutcome(line, "dropped", f"{too_long}; {error}")


def _shortened(rendered: RenderedAnswers, max_seq_len: int) -> RenderedAnswers:
    """All sides cut behind `max_seq_len` tokens. Raises ExampleError if that leaves not every pair."""
    if rendered.prompt_len >= max_seq_len:
        raise ExampleError("prompt", f"its {rendered.prompt_len} tokens leave no room for a response")
    cut = rendered.cut(max_seq_len)
    try:
        _refuse_unusable_answers(cut)
    except ExampleError as error:
        raise ExampleError(error.field, f"after shortening: {error.reason}") from None
    return cut


def _refuse_unusable_answers(rendered: RenderedAnswers) -> None:
    """See `_refuse_unusable`: of each pair."""
    names = list(rendered.sides)
    for better, worse in rendered.preferences:
        _refuse_unusable(rendered.pair(better, worse), names[better], names[worse])


def _refuse_unusable(rendered: RenderedPair, better: str = "chosen", worse: str = "rejected") -> None:
    """Raise ExampleError for what is not a pair: no prompt, no response, another prompt, no difference."""
    chosen, rejected, prompt_len = rendered.chosen_tokens, rendered.rejected_tokens, rendered.prompt_len
    if not isinstance(prompt_len, Integral) or prompt_len < 1:
        raise ExampleError(
            "prompt_len",
            f"{prompt_len!r}; expected a whole number of tokens: the first response token needs a token before it",
        )
    shared = shared_length(chosen[:prompt_len], rejected[:prompt_len])
    if shared < min(prompt_len, len(chosen), len(rejected)):
        raise ExampleError(
            "prompt_len",
            f"the first {prompt_len} tokens must be the same on both sides, but token {shared} is "
            f"{chosen[shared]} in {better} and {rejected[shared]} in {worse}",
        )
    for name, tokens, mask in (
        (better, chosen, rendered.chosen_mask),
        (worse, rejected, rendered.rejected_mask),
    ):
        if len(tokens) <= prompt_len:
            raise ExampleError(
                name, f"an empty response: {len(tokens)} tokens, of which {prompt_len} are the prompt"
            )
        if mask[:prompt_len].any():
            raise ExampleError(name, f"a token of the prompt (the first {prompt_len} tokens) is scored")
        if not mask.any():
            raise ExampleError(name, "no token of the response is scored")
    if chosen == rejected:
        raise ExampleError(worse, f"the same {len(chosen)} tokens as {better}: there is nothing to prefer")


def _scored_from(prompt_len: int, tokens: Tokens) -> RenderedSide:
    return RenderedSide(tokens, (np.arange(len(tokens)) >= prompt_len).astype(np.float32))


def datum_of(tokens: Tokens, weights: FloatArray) -> Datum:
    """A whole sequence as a datum, shifted by one; `weights` are those of its tokens."""
    inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(weights[1:], "float32")}
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def _sequence(name: str, datum: Datum) -> Tokens:
    """The whole sequence of a datum. Raises ExampleError if its targets are not its inputs shifted by one."""
    for key in ("target_tokens", "weights"):
        if key not in datum.loss_fn_inputs:
            raise ExampleError(f"{name}.loss_fn_inputs", f"{key} is missing")
    inputs = tuple(datum.model_input.to_ints())
    targets = tuple(datum.loss_fn_inputs["target_tokens"].data)
    if len(targets) != len(inputs) or targets[:-1] != inputs[1:] or not inputs:
        raise ExampleError(f"{name}.target_tokens", "not the tokens of model_input shifted by one")
    if _weights(datum).shape != (len(inputs),):
        raise ExampleError(f"{name}.weights", f"{len(_weights(datum))} weights for {len(inputs)} targets")
    return (inputs[0], *targets)


def _weights(datum: Datum) -> FloatArray:
    return datum.loss_fn_inputs["weights"].to_numpy()


def _token_ids(name: str, tokens: Sequence[int]) -> Tokens:
    try:
        ids = tuple(operator.index(token) for token in tokens)
    except TypeError:
        raise ExampleError(f"{name}_tokens", "expected token ids (integers)") from None
    if any(token < 0 for token in ids):
        raise ExampleError(f"{name}_tokens", f"{min(ids)} is not a token id: ids start at 0")
    return ids
