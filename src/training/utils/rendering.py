"""Messages → tokens and mask, through the tokenizer's own chat template.

The prompt is rendered once, with the header that asks for an answer, and must be a token prefix of both
rendered conversations: templates act on whole conversations and tokens can span a boundary, so this is proved
row by row. The mask is 1 on what the model is to write: each assistant turn of the response, from its first
token to its end-of-turn.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.fetching import shown_on_stderr
from firesteel.sdk.errors import ModelError
from firesteel.sdk.types import FloatArray
from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    Message,
    Messages,
    PlainExample,
    PreferenceExample,
    TextExample,
    Tools,
)

Tokens = tuple[int, ...]
SideName = Literal["chosen", "rejected"]

TOKENS_SHOWN = 8  # on each side of the place where two token sequences part
# Two answers that share neither their first nor their last letter: what two renderings of them have in common
# around the answer is the template's.
_PROBES = ("yes", "no")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: Any
    chat_template: Any
    is_fast: bool
    all_special_ids: list[int]
    added_tokens_decoder: dict[int, Any]
    special_tokens_map: dict[str, Any]

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Token ids under `input_ids`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> Any:
        """The text of these ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """One token as it stands in the vocabulary."""
        ...

    def apply_chat_template(
        self, conversation: Any, *, tools: Any, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """The text of a conversation."""
        ...


class RenderError(ExampleError):
    """An example that this tokenizer and its chat template cannot express exactly."""

    code = "data.render"


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


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a catalogue name, a folder, a .gguf file or a Hugging Face id. Raises ModelError."""
    from transformers import AutoTokenizer

    entry = load_catalog().resolve_model(name)
    with shown_on_stderr(name) as progress:
        folder = store.fetch_tokenizer(entry, progress)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=entry.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: there is no usable tokenizer in {folder}: {error}") from error
    return tokenizer


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """SHA-256 that changes if, and only if, the tokenizer or its chat template would give other tokens.

    Where the tokenizer came from and how it was last asked to cut or pad are no part of it.
    """
    content = {
        "backend": _backend(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _backend(tokenizer: Any) -> object:
    if not tokenizer.is_fast:
        added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        return [type(tokenizer).__qualname__, tokenizer.get_vocab(), added]
    state: dict[str, object] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {part: value for part, value in state.items() if part not in ("truncation", "padding")}


@dataclass(frozen=True)
class _AnswerFrame:
    """What the chat template puts around the content of the last assistant turn, after the prompt."""

    opening: Tokens
    """Such as the empty think block of templates that expect reasoning; given, so never scored."""
    end_of_turn: int


@dataclass(frozen=True, eq=False)
class _Scored:
    """One side: its tokens up to the last end-of-turn, and their mask."""

    tokens: Tokens
    mask: FloatArray


def _fields_to_show(role: str, *, in_prompt: bool) -> tuple[str, ...]:
    """Fields of a message that say something beside its content; whatever else stands there is metadata."""
    calls = ("tool_calls", "function_call")
    # The name of a tool is known from the call that it answers.
    names = () if role in ("tool", "function") else ("name",)
    # Reasoning of earlier turns is left out on purpose by templates of reasoning models.
    return (*calls, *names) if in_prompt else (*calls, *names, "reasoning_content", "reasoning", "thinking")


class _ChatTemplate:
    """The chat template of one tokenizer: what it makes of messages, and what it leaves out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._shown_roles: dict[str, bool] = {}

    def ids(self, messages: Messages, tools: Tools, *, header: bool) -> Tokens:
        """The tokens of a conversation; `header` adds what asks the assistant to answer."""
        return _encode(self.tokenizer, self._text(messages, tools, header=header))

    def _text(self, messages: Messages, tools: Tools, *, header: bool) -> str:
        from jinja2 import TemplateError

        try:
            # As text, since what `tokenize=True` gives back differs between versions of transformers.
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=header,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RenderError("messages", f"the chat template refuses this conversation: {error}") from error
        return str(text)

    @cached_property
    def frame(self) -> _AnswerFrame:
        """Found by rendering one question with two answers. Raises ModelError if turns do not end."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "this tokenizer has no chat template, so messages cannot be rendered; use the tokenizer of a "
                "chat model, set tokenizer.chat_template, or give prompt, chosen and rejected as plain texts"
            )
        question: Messages = ({"role": "user", "content": "?"},)
        answers = [(*question, {"role": "assistant", "content": content}) for content in _PROBES]
        try:
            prompt = self.ids(question, None, header=True)
            yes, no = (self.ids(answer, None, header=False) for answer in answers)
        except RenderError as error:
            raise ModelError(f"one question and its answer cannot be rendered: {error.reason}") from None
        start = yes[: shared_length(yes, no)]
        closing = yes[len(yes) - shared_length(yes[::-1], no[::-1]) :]
        # A template that changes the prompt when an answer follows is refused row by row.
        opening = start[len(prompt) :] if _starts_with(start, prompt) else ()
        return _AnswerFrame(opening, self._first_marker(closing))

    def _first_marker(self, closing: Tokens) -> int:
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for token in closing:
            # Some vocabularies add runs of white space as tokens; those end nothing.
            if token in added and str(self.tokenizer.decode([token])).strip():
                return token
        raise ModelError(
            f"the chat template ends the assistant's turn with {_shown(self.tokenizer, closing)}, in which "
            "there is no special token: the model could not learn where to stop; in the template, put the "
            "end-of-sequence token behind the assistant's content"
        )

    def refuse_what_is_left_out(self, example: ChatExample) -> None:
        """Templates pass over what they do not know: the model would be trained on another conversation."""
        prompt, tools = example.prompt, example.tools
        if tools and self._text(prompt, tools, header=True) == self._text(prompt, None, header=True):
            raise RenderError(
                "tools", "the chat template shows no tools; use a tokenizer whose template does"
            )
        for name, response in (("chosen", example.chosen), ("rejected", example.rejected)):
            messages = prompt + response
            for index, message in enumerate(messages):
                if not self._shows_role(messages, index, tools):
                    raise RenderError(name, f"the chat template shows no turns of role {message['role']!r}")
                for field in _fields_to_show(message["role"], in_prompt=index < len(prompt)):
                    if message.get(field) and not self._shows_field(messages, index, field, tools):
                        raise RenderError(name, f"the chat template does not show {field} of turn {index}")

    def _shows_role(self, messages: Messages, index: int, tools: Tools) -> bool:
        """Whether turns of this role appear at all: asked once for each role."""
        message = messages[index]
        role = message["role"]
        if role not in self._shown_roles:
            other = {**message, "content": message["content"] + "?"}
            self._shown_roles[role] = self._shows(messages, index, other, tools)
        return self._shown_roles[role]

    def _shows_field(self, messages: Messages, index: int, field: str, tools: Tools) -> bool:
        without = {key: value for key, value in messages[index].items() if key != field}
        return self._shows(messages, index, without, tools)

    def _shows(self, messages: Messages, index: int, other: Message, tools: Tools) -> bool:
        """Whether putting another message in this place makes a difference."""
        text = self._text(messages, tools, header=False)
        try:
            return text != self._text((*messages[:index], other, *messages[index + 1 :]), tools, header=False)
        except RenderError:
            return True


class Renderer:
    """Turns examples into tokens and masks.

    Raises ModelError at the first example that needs what the tokenizer lacks (a chat template that ends the
    assistant's turns, an end-of-sequence token), and RenderError for an example that cannot be expressed.
    Threads may share one: tokenizers may not be used by two at once, so they take turns.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        """`source` is what `load_tokenizer` loads this tokenizer by, for workers that need one of their own."""
        self.tokenizer = tokenizer
        self.source = source
        self._template = _ChatTemplate(tokenizer)
        self._one_at_a_time = threading.RLock()

    @classmethod
    def load(cls, source: str) -> Renderer:
        """On the tokenizer that `load_tokenizer` loads."""
        return cls(load_tokenizer(source), source)

    def render(self, example: PreferenceExample) -> RenderedPair:
        """Tokens and masks of both sides."""
        with self._one_at_a_time:
            if isinstance(example, ChatExample):
                return self._render_chat(example)
            if isinstance(example, PlainExample):
                return self._render_plain(example)
            return self._render_text(example)

    @cached_property
    def identity(self) -> str:
        """`tokenizer_identity` of the tokenizer."""
        return tokenizer_identity(self.tokenizer)

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

    def _render_chat(self, example: ChatExample) -> RenderedPair:
        opening = self._template.frame.opening
        self._template.refuse_what_is_left_out(example)
        prompt = self._template.ids(example.prompt, example.tools, header=True)
        chosen = self._score_turns("chosen", example, prompt)
        rejected = self._score_turns("rejected", example, prompt)
        opened = prompt + opening
        shared = opened if all(_starts_with(side.tokens, opened) for side in (chosen, rejected)) else prompt
        return RenderedPair(len(shared), chosen.tokens, rejected.tokens, chosen.mask, rejected.mask)

    def _score_turns(self, name: SideName, example: ChatExample, prompt: Tokens) -> _Scored:
        """Find every assistant turn of a response in the tokens of the whole conversation."""
        response = example.chosen if name == "chosen" else example.rejected
        whole = self._template.ids(example.prompt + response, example.tools, header=False)
        mask = np.zeros(len(whole), dtype=np.float32)
        end = 0
        for index, message in enumerate(response):
            if message["role"] != "assistant":
                continue
            self._refuse_end_of_turn_inside(name, message)
            before = prompt
            if index > 0:
                before = self._template.ids(example.prompt + response[:index], example.tools, header=True)
            start, end = self._turn(name, before, whole)
            mask[start:end] = 1.0
            if index < len(response) - 1:
                self._refuse_rewritten_turn(name, example, response[: index + 1], whole[start:end])
        return _Scored(whole[:end], mask[:end])

    def _turn(self, name: SideName, before: Tokens, whole: Tokens) -> tuple[int, int]:
        """From the first token that the model writes after `before`, to just behind the end of its turn."""
        if not _starts_with(whole, before):
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

    def _refuse_end_of_turn_inside(self, name: SideName, message: Message) -> None:
        text = str(self.tokenizer.convert_ids_to_tokens(self._template.frame.end_of_turn))
        if text in json.dumps(message, ensure_ascii=False):
            raise RenderError(
                name, f"the response contains {text}, which ends a turn; remove it from the text"
            )

    def _refuse_rewritten_turn(
        self, name: SideName, example: ChatExample, response: Messages, later: Tokens
    ) -> None:
        """A turn must read as it did when the model wrote it; some templates drop its reasoning later."""
        before = self._template.ids(example.prompt + response[:-1], example.tools, header=True)
        alone = self._template.ids(example.prompt + response, example.tools, header=False)
        start, end = self._turn(name, before, alone)
        if alone[start:end] != later:
            raise RenderError(
                name,
                f"the chat template rewrites turn {len(response) - 1} once others follow, "
                f"{self._difference(alone[start:end], later)}: make a pair of each turn",
            )

    def _difference(self, one: Tokens, other: Tokens) -> str:
        at = shared_length(one, other)
        around = slice(max(0, at - TOKENS_SHOWN // 2), at + TOKENS_SHOWN)
        here, there = (_shown(self.tokenizer, tokens[around]) for tokens in (one, other))
        return f"from token {at} on {here} against {there}"

    def _render_plain(self, example: PlainExample) -> RenderedPair:
        prompt = self._opened(example.prompt)
        chosen = prompt + self._continued("chosen", example.prompt, example.chosen)
        rejected = prompt + self._continued("rejected", example.prompt, example.rejected)
        return _after_shared_prompt(len(prompt), chosen, rejected)

    def _continued(self, name: SideName, prompt: str, response: str) -> Tokens:
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

    def _render_text(self, example: TextExample) -> RenderedPair:
        texts = [self._without_tail(text) for text in (example.chosen, example.rejected)]
        chosen, rejected = (self._closed(self._opened(text)) for text in texts)
        prompt_len = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if prompt_len < 1:
            raise RenderError(
                "chosen",
                "the two texts differ from their first token on: no prompt stands before the response",
            )
        return _after_shared_prompt(prompt_len, chosen, rejected)

    def _opened(self, text: str) -> Tokens:
        """The tokens of a text that starts a sequence, after what the tokenizer puts first, exactly once."""
        tokens = self._encode(text)
        return tokens if _starts_with(tokens, self._first_tokens) else self._first_tokens + tokens

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
        return _encode(self.tokenizer, text)


def _encode(tokenizer: Tokenizer, text: str) -> Tokens:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shown(tokenizer: Tokenizer, tokens: Tokens) -> str:
    return json.dumps(str(tokenizer.decode(list(tokens))), ensure_ascii=False)


def _after_shared_prompt(prompt_len: int, chosen: Tokens, rejected: Tokens) -> RenderedPair:
    """A pair in which everything after the prompt is scored."""
    masks = [np.ones(len(tokens), dtype=np.float32) for tokens in (chosen, rejected)]
    for mask in masks:
        mask[:prompt_len] = 0.0
    return RenderedPair(prompt_len, chosen, rejected, masks[0], masks[1])


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that are the same at the start of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _starts_with(tokens: Tokens, start: Tokens) -> bool:
    return tokens[: len(start)] == start
