"""A chosen and a rejected datum that share a prompt: what preference losses are computed on.

For a sequence ``t[0..n-1]`` a datum holds ``model_input = t[:-1]``, ``target_tokens = t[1:]`` and
``weights``, where ``weights[j]`` is 1 if ``t[j+1]`` is scored. With a prompt of p tokens the first response
token is ``t[p]``: its weight is ``weights[p-1]``.
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Literal

import numpy as np

from firesteel.sdk.errors import ConfigError, DataError, RowError
from firesteel.sdk.types import Datum, FloatArray, ModelInput, TensorData
from firesteel.sealed import storage_errors
from training.utils.preference_data import OnBadRow, PreferenceFile, refuse_rows
from training.utils.preference_examples import ExampleError, PreferenceExample
from training.utils.rendering import RenderedPair, Renderer
from training.utils.tokenizer import Tokens, shared_length

Truncate = Literal["drop", "response_end"]
Outcome = Literal["refused", "dropped", "shortened"]

REASONS_SHOWN = 5


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
class RowOutcome:
    """What became of a row that did not become a whole pair.

    It was `refused` (something is wrong with it), `dropped` (it is too long) or `shortened` (and is used).
    """

    line: int
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Rendering:
    """How rows become pairs: the longest sequence in tokens, and what is done with longer and with bad rows.

    Raises ConfigError for anything else.
    """

    max_seq_len: int | None = None
    truncate: Truncate = "drop"
    on_bad_row: OnBadRow = "fail"

    def __post_init__(self) -> None:
        if self.truncate not in ("drop", "response_end"):
            raise ConfigError(f"truncate: {self.truncate!r} is neither 'drop' nor 'response_end'")
        _refuse_limit(self.max_seq_len)

    def too_long(self, chosen: int, rejected: int) -> str:
        """Which sides have more tokens than allowed, or nothing."""
        over = [
            f"{name} has {tokens} tokens"
            for name, tokens in (("chosen", chosen), ("rejected", rejected))
            if tokens > (self.max_seq_len or tokens)
        ]
        return f"{' and '.join(over)}, more than max_seq_len {self.max_seq_len}" if over else ""


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
        return counts.summary(self.file.path, self.file.format, len(self.pairs))


@dataclass(frozen=True)
class RowCounts:
    """How many rows a file has, and what became of those that are no whole pair."""

    rows: int
    lost: Mapping[Outcome, int]
    not_used: int
    """Left over once `max_pairs` were found."""

    def summary(self, path: str, form: str, pairs: int) -> str:
        """`pairs.jsonl: 592 rows of the form messages: 551 pairs; 3 dropped, 38 refused`."""
        lost = [f"{count:,} {outcome}" for outcome, count in sorted(self.lost.items()) if count]
        lost += [f"{self.not_used:,} not used (max_pairs)"] if self.not_used else []
        read = f"{path}: {self.rows:,} rows of the form {form}"
        return f"{read}: {pairs:,} pairs" + (f"; {', '.join(lost)}" if lost else "")

    def nothing_left(self, path: str, outcomes: Iterable[RowOutcome]) -> DataError:
        """The error of a file of which no pair is left, with the first reasons."""
        counted = ", ".join(
            f"{self.lost[kind]} {kind}" for kind in ("refused", "dropped") if self.lost.get(kind)
        )
        lost = sum(self.lost.values())
        reasons = "".join(f"\n  line {row.line}: {row.reason}" for row in islice(outcomes, REASONS_SHOWN))
        more = f"\n  and {lost - REASONS_SHOWN} more" if lost > REASONS_SHOWN else ""
        return DataError(f"{path}: no pair is left of {self.rows} rows: {counted}{reasons}{more}")


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
    _refuse_limit(max_seq_len)
    rendered = _all_scored(
        prompt_len, _token_ids("chosen", chosen_tokens), _token_ids("rejected", rejected_tokens)
    )
    _refuse_unusable(rendered)
    sides = len(rendered.chosen_tokens), len(rendered.rejected_tokens)
    if max_seq_len is not None and (too_long := Rendering(max_seq_len).too_long(*sides)):
        if truncate is None:
            raise ExampleError("max_seq_len", f'{too_long}; cut responses with truncate="response_end"')
        rendered = _shortened(rendered, max_seq_len)
    return _datums(rendered)


def render_pairs(
    file: PreferenceFile,
    renderer: Renderer,
    rules: Rendering | None = None,
    max_pairs: int | None = None,
) -> RenderedPairs:
    """The pairs of a file's examples, at most `max_pairs` of them, all in memory (recipes: `pair_sets`).

    Rows in which a side is longer than the rules allow are dropped, or with ``truncate="response_end"``
    shortened at the end of the response. Examples that cannot be rendered are refused: all at once by an
    error (`"fail"`), or listed beside the reader's own bad rows (`"skip"`). Raises DataError if no pair is
    left.
    """
    refuse_max_pairs(max_pairs)
    rules = rules or Rendering()
    pairs: list[PreferencePair] = []
    refused: list[RowError] = []
    outcomes: list[RowOutcome] = []
    used = 0
    for example in file.examples:
        if len(pairs) == max_pairs:
            break
        used += 1
        try:
            rendered = render_usable(renderer, example)
        except ExampleError as error:
            refused.append(error.at(file.path, example.line))
            continue
        fitted, outcome = _fitted(rendered, rules, example.line)
        outcomes += [outcome] if outcome else []
        pairs += [pair_of(fitted, example)] if fitted else []
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


def write_row_outcomes(path: str | Path, source: str, outcomes: Iterable[RowOutcome]) -> None:
    """Append one JSON object per row that was refused, dropped or shortened: file, line, outcome, reason.

    `source` is the data file they are from. A file that stays empty says that nothing was lost.
    """
    rows = (
        {"file": source, "line": row.line, "outcome": row.outcome, "reason": row.reason} for row in outcomes
    )
    with storage_errors(Path(path), 0), Path(path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refuse_max_pairs(max_pairs: int | None) -> None:
    """Raise ConfigError for what is no number of pairs."""
    if max_pairs is not None and not (isinstance(max_pairs, Integral) and max_pairs >= 1):
        raise ConfigError(f"max_pairs: {max_pairs!r} is not a number of pairs above 0")


def render_usable(renderer: Renderer, example: PreferenceExample) -> RenderedPair:
    """The tokens of an example, whatever their number. Raises ExampleError where they are no pair."""
    rendered = renderer.render(example)
    _refuse_unusable(rendered)
    return rendered


def pair_of(rendered: RenderedPair, example: PreferenceExample) -> PreferencePair:
    """The pair of a row whose tokens fit."""
    return PreferencePair(*_datums(rendered), rendered.prompt_len, example.line, example.weight)


def _fitted(
    rendered: RenderedPair, rules: Rendering, line: int
) -> tuple[RenderedPair | None, RowOutcome | None]:
    """The pair as it fits the limit, or None; and what had to be done to it, if anything."""
    too_long = rules.too_long(len(rendered.chosen_tokens), len(rendered.rejected_tokens))
    if not too_long:
        return rendered, None
    if rules.truncate == "drop":
        return None, RowOutcome(line, "dropped", too_long)
    return shortened_or_dropped(rendered, rules, line)


def shortened_or_dropped(
    rendered: RenderedPair, rules: Rendering, line: int
) -> tuple[RenderedPair | None, RowOutcome]:
    """A pair over the limit without the end of its responses, or None where that leaves no pair."""
    too_long = rules.too_long(len(rendered.chosen_tokens), len(rendered.rejected_tokens))
    assert rules.max_seq_len is not None
    try:
        return _shortened(rendered, rules.max_seq_len), RowOutcome(line, "shortened", too_long)
    except ExampleError as error:
        return None, RowOutcome(line, "dropped", f"{too_long}; {error}")


def _shortened(rendered: RenderedPair, max_seq_len: int) -> RenderedPair:
    """Both sides cut behind `max_seq_len` tokens. Raises ExampleError if that leaves no pair."""
    if rendered.prompt_len >= max_seq_len:
        raise ExampleError("prompt", f"its {rendered.prompt_len} tokens leave no room for a response")
    cut = RenderedPair(
        rendered.prompt_len,
        rendered.chosen_tokens[:max_seq_len],
        rendered.rejected_tokens[:max_seq_len],
        rendered.chosen_mask[:max_seq_len],
        rendered.rejected_mask[:max_seq_len],
    )
    try:
        _refuse_unusable(cut)
    except ExampleError as error:
        raise ExampleError(error.field, f"after shortening: {error.reason}") from None
    return cut


def _refuse_unusable(rendered: RenderedPair) -> None:
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
            f"{chosen[shared]} in chosen and {rejected[shared]} in rejected",
        )
    for name, tokens, mask in (
        ("chosen", chosen, rendered.chosen_mask),
        ("rejected", rejected, rendered.rejected_mask),
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
        raise ExampleError("rejected", f"the same {len(chosen)} tokens as chosen: there is nothing to prefer")


def _all_scored(prompt_len: int, chosen: Tokens, rejected: Tokens) -> RenderedPair:
    masks = [(np.arange(len(tokens)) >= prompt_len).astype(np.float32) for tokens in (chosen, rejected)]
    return RenderedPair(prompt_len, chosen, rejected, masks[0], masks[1])


def _datums(rendered: RenderedPair) -> tuple[Datum, Datum]:
    return (
        _datum(rendered.chosen_tokens, rendered.chosen_mask),
        _datum(rendered.rejected_tokens, rendered.rejected_mask),
    )


def _datum(tokens: Tokens, mask: FloatArray) -> Datum:
    inputs = {"target_tokens": TensorData(tokens[1:], "int64"), "weights": TensorData(mask[1:], "float32")}
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


def _refuse_limit(max_seq_len: int | None) -> None:
    if max_seq_len is not None and not (isinstance(max_seq_len, Integral) and max_seq_len >= 2):
        raise ConfigError(
            f"max_seq_len: {max_seq_len!r}; expected a whole number of tokens, at least 2 (prompt and response)"
        )
