"""The chat template of a tokenizer: messages → tokens, where an answer ends, and what the template leaves out."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

import numpy as np

from firesteel.sdk.errors import ModelError
from training.utils.preference_examples import ExampleError, Message, Messages, Tools
from training.utils.tokenizer import Tokenizer, Tokens, encode, shared_length, shown_text, starts_with

# Two answers that share neither their first nor their last letter: what two renderings of them have in common
# around the answer is the template's.
_PROBES = ("yes", "no")


class RenderError(ExampleError):
    """An example that this tokenizer and its chat template cannot express exactly."""

    code = "data.render"


@dataclass(frozen=True)
class AnswerFrame:
    """What the chat template puts around the content of the last assistant turn, after the prompt."""

    opening: Tokens
    """Such as the empty think block of templates that expect reasoning; given, so never scored."""
    end_of_turn: int


def _fields_to_show(role: str, *, in_prompt: bool) -> tuple[str, ...]:
    """Fields of a message that say something beside its content; whatever else stands there is metadata."""
    calls = ("tool_calls", "function_call")
    # The name of a tool is known from the call that it answers.
    names = () if role in ("tool", "function") else ("name",)
    # Reasoning of earlier turns is left out on purpose by templates of reasoning models.
    return (*calls, *names) if in_prompt else (*calls, *names, "reasoning_content", "reasoning", "thinking")


class ChatTemplate:
    """The chat template of one tokenizer: what it makes of messages, and what it leaves out."""

    def __init__(self, tokenizer: Tokenizer, today: date) -> None:
        self.tokenizer = tokenizer
        self._template = _with_date(tokenizer.chat_template, datetime.combine(today, time()))
        self._shown_roles: dict[str, bool] = {}

    @property
    def dated(self) -> bool:
        """Whether the template may print the date."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def ids(self, messages: Messages, tools: Tools, *, header: bool) -> Tokens:
        """The tokens of a conversation; `header` adds what asks the assistant to answer."""
        return encode(self.tokenizer, self._text(messages, tools, header=header))

    def _text(self, messages: Messages, tools: Tools, *, header: bool) -> str:
        # As text, since what `tokenize=True` gives back differs between versions of transformers.
        return str(self._rendered(messages, tools, header, tokenize=False))

    def _rendered(self, messages: Messages, tools: Tools, header: bool, **how: bool) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=header,
                chat_template=self._template,
                **how,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RenderError("messages", f"the chat template refuses this conversation: {error}") from error

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template itself says which of its text the assistant writes (`{% generation %}`)."""
        return (
            re.search(r"\{%-?\s*generation\s*-?%\}", str(self._template or self.tokenizer.chat_template))
            is not None
        )

    def marked(self, messages: Messages, tools: Tools) -> tuple[Tokens, list[range]]:
        """The tokens of a conversation, and where in them the template marks what the assistant writes, turn by turn.

        Raises RenderError where the marks are not on the tokens that `ids` gives.
        """
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._rendered(messages, tools, False, **how)
        tokens = tuple(encoded["input_ids"])
        if tokens != self.ids(messages, tools, header=False):
            raise RenderError(
                "messages", "with its answers marked the conversation has other tokens than without"
            )
        edges = np.flatnonzero(np.diff([0, *encoded["assistant_masks"], 0]))
        return tokens, [
            range(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]

    @cached_property
    def frame(self) -> AnswerFrame:
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
        opening = start[len(prompt) :] if starts_with(start, prompt) else ()
        return AnswerFrame(opening, self._first_marker(closing))

    def _first_marker(self, closing: Tokens) -> int:
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for token in closing:
            # Some vocabularies add runs of white space as tokens; those end nothing.
            if token in added and str(self.tokenizer.decode([token])).strip():
                return token
        raise ModelError(
            f"the chat template ends the assistant's turn with {shown_text(self.tokenizer, closing)}, in which "
            "there is no special token: the model could not learn where to stop; in the template, put the "
            "end-of-sequence token behind the assistant's content"
        )

    def refuse_what_is_left_out(
        self, name: str, messages: Messages, own: Container[int], tools: Tools
    ) -> None:
        """Templates pass over what they do not know: the model would be trained on another conversation.

        `own` are the places of what is scored: there reasoning must be shown, too.
        """
        if tools and self._text(messages, tools, header=False) == self._text(messages, None, header=False):
            raise RenderError(
                "tools", "the chat template shows no tools; use a tokenizer whose template does"
            )
        for index, message in enumerate(messages):
            if not self._shows_role(messages, index, tools):
                raise RenderError(name, f"the chat template shows no turns of role {message['role']!r}")
            for field in _fields_to_show(message["role"], in_prompt=index not in own):
                if message.get(field) and not self._shows_field(messages, index, field, tools):
                    raise RenderError(name, f"the chat template does not show {field} of turn {index}")

    def drops_the_start(self, messages: Messages, index: int, tools: Tools) -> bool:
        """Whether what a message begins with makes no difference: some templates cut reasoning out of the content."""
        message = messages[index]
        return not self._shows(messages, index, {**message, "content": "?" + message["content"]}, tools)

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


def _with_date(template: object, now: datetime) -> str | None:
    """A template that prints this date wherever it asks for today's; None leaves it to the tokenizer.

    Rows are rendered more than once, and must stay the same past midnight. Templates ask by a literal format; one
    that does not is left as it is.
    """
    if not isinstance(template, str):
        return None  # none, or several by name
    asking = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(asking, lambda found: repr(now.strftime(found[2])), template)
