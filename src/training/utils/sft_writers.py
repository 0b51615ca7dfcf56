"""What a supervised example says, written as a row of each form that `sft_data` reads."""

from __future__ import annotations

from collections.abc import Callable

from training.utils.preference_examples import ExampleError, Message
from training.utils.row_extras import NewRow, tools_beside
from training.utils.row_values import excerpt
from training.utils.sft_examples import CompletionExample, DocumentExample, SftExample, TurnsExample

_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def write_supervised(example: SftExample, form: str) -> NewRow:
    """The row of a form. Raises ExampleError for what cannot be said in it."""
    return _WRITERS[form](example)


def _turns(example: SftExample) -> TurnsExample:
    if not isinstance(example, TurnsExample):
        raise ExampleError(
            "row", "holds texts, and that form messages: a chat template would be added to them"
        )
    return example


def _weighted(turns: TurnsExample) -> list[Message]:
    """The messages; those of the assistant's that are not learned say so."""
    return [
        {**message, "weight": 0} if message["role"] == "assistant" and not learned else message
        for message, learned in zip(turns.messages, turns.learned, strict=True)
    ]


def _as_messages(example: SftExample) -> NewRow:
    turns = _turns(example)
    return {"messages": _weighted(turns)} | tools_beside(turns.tools)


def _as_completion(example: SftExample) -> NewRow:
    if isinstance(example, DocumentExample):
        raise ExampleError("row", "is one whole text, and a completion has its prompt apart")
    if isinstance(example, CompletionExample):
        return {"prompt": example.prompt, "completion": example.completion}
    first = example.learned.index(True)
    row = {"prompt": list(example.messages[:first]), "completion": _weighted(example)[first:]}
    return row | tools_beside(example.tools)


def _as_alpaca(example: SftExample) -> NewRow:
    turns = _turns(example)
    if turns.tools:
        raise ExampleError("row", "has tools, and that form none")
    system = {"system": turns.messages[0]["content"]} if turns.messages[0]["role"] == "system" else {}
    _refuse_what_alpaca_lacks(turns, start=len(system))
    texts = [message["content"] for message in turns.messages[len(system) :]]
    *history, (asked, said) = map(list, zip(texts[::2], texts[1::2], strict=True))
    # Programs expect the `input` that Alpaca's own rows have, empty or not.
    row = {"instruction": asked, "input": "", "output": said}
    return row | system | ({"history": history} if history else {})


def _refuse_what_alpaca_lacks(turns: TurnsExample, start: int) -> None:
    """From `start` on, user and assistant take turns; all answers are learned, and a turn is its text."""
    if (len(turns.messages) - start) % 2:
        raise ExampleError("row", "has turns that are no questions and answers in pairs, as that form has")
    for index, (message, learned) in enumerate(zip(turns.messages, turns.learned, strict=True)):
        which = f"{excerpt(message['content'])}, a turn of role {message['role']}"
        if message.keys() != {"role", "content"}:
            (other, *_) = message.keys() - {"role", "content"}
            raise ExampleError("row", f"{which}, has `{other}`, and that form texts only")
        if index < start:
            continue
        wanted = ("user", "assistant")[(index - start) % 2]
        if message["role"] != wanted:
            raise ExampleError("row", f"{which}, stands where that form has one of role {wanted}")
        if wanted == "assistant" and not learned:
            raise ExampleError("row", f"{which}, is not learned, and in that form all answers are")


def _as_sharegpt(example: SftExample) -> NewRow:
    turns = _turns(example)
    conversation = []
    for message in _weighted(turns):
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        if message["role"] not in _SHAREGPT_NAMES:
            raise ExampleError("row", f"has a turn of role {message['role']}, which that form does not name")
        said = {"from": _SHAREGPT_NAMES[message["role"]], "value": message["content"]}
        conversation.append(said | others)
    return {"conversations": conversation} | tools_beside(turns.tools)


def _as_text(example: SftExample) -> NewRow:
    if isinstance(example, TurnsExample):
        raise ExampleError("row", "holds messages, and that form a text: it would have no chat template")
    if isinstance(example, CompletionExample):
        raise ExampleError("row", "has a prompt that is not learned, and of that form all is")
    return {"text": example.text}


_WRITERS: dict[str, Callable[[SftExample], NewRow]] = {
    "messages": _as_messages,
    "completion": _as_completion,
    "alpaca": _as_alpaca,
    "sharegpt": _as_sharegpt,
    "text": _as_text,
}
SFT_FORMS = tuple(_WRITERS)
"""What can be written: all that is read."""
