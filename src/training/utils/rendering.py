"""Messages → tokens and mask, through the tokenizer's own chat template.

The prompt is rendered once, with the header that asks for an answer, and must be a token prefix of both
rendered conversations: templates act on whole conversations and tokens can span a boundary, so this is proved
row by row. The mask is 1 on what the model is to write: each assistant turn of the response, from its first
token to its end-of-turn.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property

import numpy as np

from firesteel.sdk.errors import ModelError
from firesteel.sdk.types import FloatArray
from training.utils.chat_template import ChatTemplate, RenderError
from training.utils.preference_examples import (
    ChatExample,
    Message,
    Messages,
    PlainExample,
    PreferenceExample,
    RankedExample,
    TextExample,
    Tools,
)
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample, TurnsExample
from training.utils.tokenizer import (
    Tokenizer,
    Tokens,
    encode,
    load_tokenizer,
    shared_length,
    shown_text,
    starts_with,
    tokenizer_identity,
)

TOKENS_SHOWN = 8  # on each side of the place where two token sequences part


@dataclass(frozen=True, eq=False)
class RenderedPair:
    """Two token sequences that share their first `prompt_len` tokens, and which of their tokens are scored.

    Masks are float32 of the length of their side, 1 on scored tokens, and 0 at least on the prompt.
    """

    prompt_len: int
    chosen_tokens: Tokens
    rejected_tokens: Tokens
    chosen_mask: FloatArray
    rejected_mask: FloatArray


@dataclass(frozen=True, eq=False)
class RenderedSide:
    """One sequence: its tokens up to the last end-of-turn, and which of them are scored."""

    tokens: Tokens
    mask: FloatArray


@dataclass(frozen=True, eq=False)
class RenderedAnswers:
    """Two or more answers that share their first `prompt_len` tokens."""

    prompt_len: int
    sides: Mapping[str, RenderedSide]
    """By what they are called in errors."""
    preferences: Sequence[tuple[int, int]] = ((0, 1),)
    """Which answer is better than which other, by place."""
    ties: int = 0
    """Twos of answers between which nothing is preferred."""

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each whole answer, the prompt's among them."""
        return {name: len(side.tokens) for name, side in self.sides.items()}

    def cut(self, max_seq_len: int) -> RenderedAnswers:
        """All sides without what lies behind so many tokens."""
        sides = {
            name: RenderedSide(side.tokens[:max_seq_len], side.mask[:max_seq_len])
            for name, side in self.sides.items()
        }
        return replace(self, sides=sides)

    def pair(self, chosen: int = 0, rejected: int = 1) -> RenderedPair:
        """Two of the answers."""
        sides = list(self.sides.values())
        one, other = sides[chosen], sides[rejected]
        return RenderedPair(self.prompt_len, one.tokens, other.tokens, one.mask, other.mask)


class Renderer:
    """Turns examples into tokens and masks.

    Raises ModelError at the first example that needs what the tokenizer lacks (a chat template that ends the
    assistant's turns, an end-of-sequence token), and RenderError for an example that cannot be expressed.
    Threads may share one: tokenizers may not be used by two at once, so they take turns.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, today: date | None = None) -> None:
        """`source` is what `load_tokenizer` loads this tokenizer by, for workers that need one of their own.

        `today` is the date that a template which prints one is given, as long as this renderer lives.
        """
        self.tokenizer = tokenizer
        self.source = source
        self.today = today or date.today()
        self._template = ChatTemplate(tokenizer, self.today)
        self._one_at_a_time = threading.RLock()

    @classmethod
    def load(cls, source: str, today: date | None = None) -> Renderer:
        """On the tokenizer that `load_tokenizer` loads."""
        return cls(load_tokenizer(source), source, today)

    def render(self, example: ChatExample | PlainExample | TextExample) -> RenderedPair:
        """Tokens and masks of both sides."""
        return self.render_answers(example).pair()

    def render_answers(self, example: PreferenceExample) -> RenderedAnswers:
        """Tokens and masks of all answers of an example, two or more."""
        with self._one_at_a_time:
            match example:
                case ChatExample():
                    turns = {"chosen": example.chosen, "rejected": example.rejected}
                    return self._render_turns(example.prompt, turns, example.tools)
                case PlainExample():
                    texts = {"chosen": example.chosen, "rejected": example.rejected}
                    return self._render_continuations(example.prompt, texts)
                case TextExample():
                    return self._render_texts(example)
                case RankedExample():
                    return replace(
                        self._render_ranked(example), preferences=example.preferences, ties=example.ties
                    )

    def render_learned(self, example: SftExample) -> RenderedSide:
        """Tokens of a supervised example, and which of them are learned."""
        with self._one_at_a_time:
            match example:
                case TurnsExample():
                    own = [place for place, learned in enumerate(example.learned) if learned]
                    self._template.refuse_what_is_left_out("messages", example.messages, own, example.tools)
                    by = self._marked_turns if self._template.marks_answers else self._learned_turns
                    return by(example)
                case CompletionExample():
                    texts = {"completion": example.completion}
                    return self._render_continuations(example.prompt, texts).sides["completion"]
                case DocumentExample():
                    tokens = self._closed(self._opened(self._without_tail(example.text)))
                    return _scored_after(1, {"text": tokens}).sides["text"]

    @cached_property
    def identity(self) -> str:
        """`tokenizer_identity` of the tokenizer, and the date where the template may print it."""
        identity = tokenizer_identity(self.tokenizer)
        return f"{identity} {self.today.isoformat()}" if self._template.dated else identity

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """How special tokens are written, those of reasoning left out: it is written with them on purpose."""
        added, special = self.tokenizer.added_tokens_decoder.items(), set(self.tokenizer.all_special_ids)
        texts = {str(token) for index, token in added if index in special or token.special}
        return tuple(sorted(texts - {"<think>", "</think>"}))

    @property
    def end_of_turn(self) -> int:
        """The token that ends the assistant's turn."""
        return self._template.frame.end_of_turn

    def question(self, text: str) -> Tokens:
        """A user message, rendered up to where the assistant answers."""
        with self._one_at_a_time:
            opening = self._template.frame.opening  # first: it says what a tokenizer lacks
            return self._template.ids(({"role": "user", "content": text},), None, header=True) + opening

    def answer_text(self, tokens: Sequence[int]) -> str:
        """What the assistant said, without the end of its turn."""
        said = tokens[:-1] if tokens and tokens[-1] == self.end_of_turn else tokens
        with self._one_at_a_time:
            return str(self.tokenizer.decode(list(said)))

    def _render_ranked(self, example: RankedExample) -> RenderedAnswers:
        named = {f"answer {place}": answer for place, answer in enumerate(example.answers, start=1)}
        if isinstance(example.prompt, str):
            texts = {name: answer for name, answer in named.items() if isinstance(answer, str)}
            return self._render_continuations(example.prompt, texts)
        turns = {name: answer for name, answer in named.items() if not isinstance(answer, str)}
        return self._render_turns(example.prompt, turns, example.tools)

    def _render_turns(
        self, prompt: Messages, answers: Mapping[str, Messages], tools: Tools
    ) -> RenderedAnswers:
        """Answers that are turns after one conversation."""
        opening = self._template.frame.opening
        for name, answer in answers.items():
            own = range(len(prompt), len(prompt) + len(answer))
            self._template.refuse_what_is_left_out(name, prompt + answer, own, tools)
        asked = self._template.ids(prompt, tools, header=True)
        sides = {name: self._score_answer(name, prompt, answer, tools) for name, answer in answers.items()}
        opened = asked + opening
        shared = opened if all(starts_with(side.tokens, opened) for side in sides.values()) else asked
        return RenderedAnswers(len(shared), sides)

    def _marked_turns(self, example: TurnsExample) -> RenderedSide:
        """By the template's own marks of what the assistant writes, one for each of its turns."""
        messages, tools = example.messages, example.tools
        whole, marked = self._template.marked(messages, tools)
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) != len(turns):
            raise RenderError(
                "messages",
                f"the chat template marks {len(marked)} answers where the assistant has {len(turns)} turns",
            )
        mask, end = np.zeros(len(whole), dtype=np.float32), 0
        for place, span in zip(turns, marked, strict=True):
            if not example.learned[place]:
                continue
            self._refuse_end_of_turn_inside("messages", messages[place])
            start, end = self._marked_turn(messages[:place], tools, whole, span)
            mask[start:end] = 1.0
            if place < len(messages) - 1:
                alone, (*_, last) = self._template.marked(messages[: place + 1], tools)
                self._refuse_another_turn(
                    "messages", place, alone[last.start : last.stop], whole[span.start : span.stop]
                )
        return RenderedSide(whole[:end], mask[:end])

    def _marked_turn(self, before: Messages, tools: Tools, whole: Tokens, span: range) -> tuple[int, int]:
        """What of a marked span the model writes: behind header and opening, up to the first end of its turn."""
        frame, start = self._template.frame, span.start
        asked = self._template.ids(before, tools, header=True)
        if starts_with(whole, asked):  # a template may change the prompt; then its marks are all there is
            opened = asked + frame.opening
            start = max(start, len(opened) if starts_with(whole, opened) else len(asked))
        if frame.end_of_turn not in whole[start : span.stop]:
            raise ModelError(
                f"the chat template's generation block leaves out {shown_text(self.tokenizer, (frame.end_of_turn,))}, "
                "which ends the assistant's turn: the model could not learn where to stop; in the template, put "
                "endgeneration behind it"
            )
        return start, whole.index(frame.end_of_turn, start) + 1

    def _learned_turns(self, example: TurnsExample) -> RenderedSide:
        """By rendering what stands before each turn: it must be the start of the whole conversation, token by token."""
        places = [index for index, learned in enumerate(example.learned) if learned]
        return self._score_turns("messages", example.messages, places, example.tools)

    def _score_answer(self, name: str, prompt: Messages, response: Messages, tools: Tools) -> RenderedSide:
        """Every assistant turn of a response is scored."""
        turns = prompt + response
        places = [place for place in range(len(prompt), len(turns)) if turns[place]["role"] == "assistant"]
        return self._score_turns(name, turns, places, tools)

    def _score_turns(self, name: str, turns: Messages, scored: Sequence[int], tools: Tools) -> RenderedSide:
        """Find some of the assistant's turns, by place, in the tokens of the whole conversation."""
        whole = self._template.ids(turns, tools, header=False)
        mask = np.zeros(len(whole), dtype=np.float32)
        end = 0
        for place in scored:
            self._refuse_end_of_turn_inside(name, turns[place])
            before = self._template.ids(turns[:place], tools, header=True)
            start, end = self._turn(name, before, whole)
            mask[start:end] = 1.0
            if place < len(turns) - 1:
                alone = self._template.ids(turns[: place + 1], tools, header=False)
                first, last = self._turn(name, before, alone)
                self._refuse_another_turn(name, place, alone[first:last], whole[start:end])
            self._refuse_dropped_start(name, turns, place, tools, whole[start:end])
        return RenderedSide(whole[:end], mask[:end])

    def _turn(self, name: str, before: Tokens, whole: Tokens) -> tuple[int, int]:
        """From the first token that the model writes after `before`, to just behind the end of its turn."""
        if not starts_with(whole, before):
            raise RenderError(
                name,
                "the rendered prompt is not the start of the rendered conversation, "
                f"{self._difference(before, whole)}: the chat template or the tokenizer changes the prompt "
                "when the answer follows",
            )
        frame = self._template.frame
        start = len(before)
        if whole[start : start + len(frame.opening)] == frame.opening:
            start += len(frame.opening)
        try:
            return start, whole.index(frame.end_of_turn, start) + 1
        except ValueError:
            text = self.tokenizer.convert_ids_to_tokens(frame.end_of_turn)
            raise RenderError(name, f"the chat template does not end this response with {text}") from None

    def _refuse_end_of_turn_inside(self, name: str, message: Message) -> None:
        text = str(self.tokenizer.convert_ids_to_tokens(self._template.frame.end_of_turn))
        if text in json.dumps(message, ensure_ascii=False):
            raise RenderError(
                name, f"the response contains {text}, which ends a turn; remove it from the text"
            )

    def _refuse_another_turn(self, name: str, place: int, alone: Tokens, later: Tokens) -> None:
        """A turn must read as it did when the model wrote it; some templates drop its reasoning later."""
        if alone != later:
            raise RenderError(
                name,
                f"the chat template rewrites turn {place} once others follow, "
                f"{self._difference(alone, later)}: make a row of each turn",
            )

    def _refuse_dropped_start(
        self, name: str, turns: Messages, place: int, tools: Tools, scored: Tokens
    ) -> None:
        """What the row says must be what is scored: where it does not stand there as it is, the template is asked."""
        said, shown = (
            "".join(text.split())
            for text in (turns[place]["content"], str(self.tokenizer.decode(list(scored))))
        )
        if said not in shown and self._template.drops_the_start(turns, place, tools):
            raise RenderError(
                name,
                f"the chat template leaves out the start of turn {place}: of {shown_text(self.tokenizer, scored)} the "
                "row says more; take a tokenizer whose template shows it, or remove it from the row",
            )

    def _difference(self, one: Tokens, other: Tokens) -> str:
        at = shared_length(one, other)
        around = slice(max(0, at - TOKENS_SHOWN // 2), at + TOKENS_SHOWN)
        here, there = (shown_text(self.tokenizer, tokens[around]) for tokens in (one, other))
        return f"from token {at} on {here} against {there}"

    def _render_continuations(self, prompt: str, texts: Mapping[str, str]) -> RenderedAnswers:
        """Answers that are texts after one text."""
        opened = self._opened(prompt)
        sides = {name: opened + self._continued(name, prompt, text) for name, text in texts.items()}
        return _scored_after(len(opened), sides)

    def _continued(self, name: str, prompt: str, response: str) -> Tokens:
        """The tokens of a response, made apart from those of its prompt: they must read as the texts do."""
        tokens = self._encode(self._without_tail(response))
        apart = self._encode(prompt) + tokens
        together = self._encode(prompt + self._without_tail(response))
        if self.tokenizer.decode(list(apart)) != self.tokenizer.decode(list(together)):
            raise RenderError(
                name,
                "this tokenizer changes the text where prompt and response meet, "
                f"{self._difference(apart, together)}: give the row as messages or as two whole texts",
            )
        return self._closed(tokens)

    def _render_texts(self, example: TextExample) -> RenderedAnswers:
        texts = [self._without_tail(text) for text in (example.chosen, example.rejected)]
        chosen, rejected = (self._closed(self._opened(text)) for text in texts)
        prompt_len = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if prompt_len < 1:
            raise RenderError(
                "chosen",
                "the two texts differ from their first token on: no prompt stands before the response",
            )
        return _scored_after(prompt_len, {"chosen": chosen, "rejected": rejected})

    def _opened(self, text: str) -> Tokens:
        """The tokens of a text that starts a sequence, after what the tokenizer puts first, exactly once."""
        tokens = self._encode(text)
        return tokens if starts_with(tokens, self._first_tokens) else self._first_tokens + tokens

    @cached_property
    def _first_tokens(self) -> Tokens:
        """What the tokenizer puts before every text: the beginning-of-sequence token, or nothing."""
        bare = self._encode("a")
        full = tuple(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        starts = range(len(full) - len(bare) + 1)
        return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), ())

    def _closed(self, tokens: Tokens) -> Tokens:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                "this tokenizer has no end-of-sequence token, so plain texts have no end; "
                "set tokenizer.eos_token"
            )
        return tokens if tokens[-1:] == (end,) else (*tokens, end)

    def _without_tail(self, text: str) -> str:
        """Without the white space that stands behind an end-of-sequence token in texts templated before."""
        end, stripped = self.tokenizer.eos_token, text.rstrip()
        return stripped if end and stripped.endswith(str(end)) else text

    def _encode(self, text: str) -> Tokens:
        return encode(self.tokenizer, text)


def _scored_after(prompt_len: int, sides: Mapping[str, Tokens]) -> RenderedAnswers:
    """Answers of which everything after the prompt is scored."""
    masks = {
        name: (np.arange(len(tokens)) >= prompt_len).astype(np.float32) for name, tokens in sides.items()
    }
    scored = {name: RenderedSide(tokens, masks[name]) for name, tokens in sides.items()}
    return RenderedAnswers(prompt_len, scored)
