"""One side of a preference as a supervised example: what is asked is its prompt, and that side alone is learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from training.utils.preference_examples import PlainExample, PreferenceExample, TextExample
from training.utils.preference_rows import prompt_and_answers
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample, TurnsExample

Side: TypeAlias = Literal["chosen", "rejected"]


def side_of(example: PreferenceExample, side: Side) -> SftExample:
    """The same tokens as that side has, and the same of them learned; of a list its best answer, or its worst.

    Of a whole text all is learned: its prompt is what the two sides share in tokens, and no row can say that.
    """
    return replace(_learned(example, side), weight=example.weight, source=example.source)


def _learned(example: PreferenceExample, side: Side) -> SftExample:
    prompt, answers = prompt_and_answers(example)
    answer = answers[0] if side == "chosen" else answers[-1]
    if isinstance(example, TextExample):
        return DocumentExample(str(answer), example.line)
    if isinstance(example, PlainExample) or isinstance(prompt, str) or isinstance(answer, str):
        return CompletionExample(str(prompt), str(answer), example.line)
    learned = (*(False for _ in prompt), *(turn["role"] == "assistant" for turn in answer))
    return TurnsExample(prompt + answer, learned, example.tools, example.line)
