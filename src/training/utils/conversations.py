"""Messages and tools of a row: what each must look like, and where two conversations part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, cast

from training.utils.preference_examples import ChatExample, ExampleError, Message, Messages, Tools
from training.utils.row_values import Row, excerpt, keys_found, same_json, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What is not the model's own or its tools' doing: it must be the same on both sides.
ASKING_ROLES = ("system", "developer", "user")
_NOT_TEXT = ("images", "image", "audio", "video", "videos")


@dataclass(frozen=True)
class Conversation:
    """Checked messages, and for each where it stands in its row."""

    messages: Messages
    places: tuple[str, ...]

    def __add__(self, other: Conversation) -> Conversation:
        return Conversation(self.messages + other.messages, self.places + other.places)


def read_conversation(value: object, place: str) -> Conversation:
    """A list of messages, each checked. Raises ExampleError naming the message and field."""
    if not isinstance(value, list):
        raise ExampleError(place, f"{shown(value)}; expected a list of messages")
    if not value:
        raise ExampleError(place, "an empty list; expected at least one message")
    places = tuple(f"{place}[{index}]" for index in range(len(value)))
    return Conversation(
        tuple(_message(item, where) for item, where in zip(value, places, strict=True)), places
    )


def read_response(value: object, place: str) -> Conversation:
    """The same, of what follows a prompt that stands apart: the assistant has the first turn."""
    response = read_conversation(value, place)
    _expect_assistant(response, 0, "the first turn of a response (the prompt stands apart)")
    return response


def one_turn(role: str, text: str, place: str) -> Conversation:
    """A text as the only message of a conversation. Raises ExampleError if it says nothing."""
    if not text.strip():
        raise ExampleError(place, f"{shown(text)}; expected some text")
    return Conversation(({"role": role, "content": text},), (place,))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise ExampleError(place, f"{shown(value)}; expected a message: an object with role and content")
    if "role" not in value:
        raise ExampleError(f"{place}.role", f"missing; {keys_found(value)}")
    role = value["role"]
    if role not in ROLES:
        raise ExampleError(f"{place}.role", f"{shown(role)}; expected one of {', '.join(ROLES)}")
    for field in _NOT_TEXT:
        if value.get(field):
            raise ExampleError(f"{place}.{field}", f"{shown(value[field])}; only text can be trained on")
    if value.get("weight") is not None and (
        isinstance(value["weight"], bool) or value["weight"] not in (0, 1)
    ):
        raise ExampleError(f"{place}.weight", f"{shown(value['weight'])}; expected 0 or 1")
    has_calls = _has_tool_calls(value, place)
    return {**value, "content": _content(value, has_calls, f"{place}.content")}


def _has_tool_calls(message: Message, place: str) -> bool:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        # As OpenAI called it before.
        return bool(message.get("function_call")) and message["role"] == "assistant"
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ExampleError(f"{place}.tool_calls", f"{shown(calls)}; expected a list of objects")
    if message["role"] != "assistant":
        raise ExampleError(
            f"{place}.tool_calls", f"on a turn of role {message['role']}; only the assistant calls tools"
        )
    return True


def _content(message: Message, has_calls: bool, place: str) -> str:
    content = message.get("content")
    if content is None and has_calls:
        return ""
    if "content" not in message:
        raise ExampleError(place, f"missing; {keys_found(message)}")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        expected = (
            "a string or a list of text parts"
            if content is not None
            else "a string (null only beside tool_calls)"
        )
        raise ExampleError(place, f"{shown(content)}; expected {expected}")
    return "".join(_text_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _text_part(part: object, place: str) -> str:
    if not isinstance(part, dict) or "type" not in part:
        raise ExampleError(place, f'{shown(part)}; expected a part like {{"type": "text", "text": "…"}}')
    if part["type"] != "text":
        raise ExampleError(f"{place}.type", f"{shown(part['type'])}; only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise ExampleError(f"{place}.text", f"{shown(part.get('text'))}; expected a string")
    return cast("str", part["text"])


def read_tools(row: Row, *containers: tuple[str, Row]) -> Tools:
    """The tools of a row: its own or those of an object in it (`input.tools`); two lists must be the same."""
    holders = [("tools", row)] if row.get("tools") else []
    if any(holder.get("tools") for _, holder in containers):
        holders += [(f"{name}.tools", holder) for name, holder in containers]
    found = [(place, holder.get("tools") or []) for place, holder in holders]
    for place, tools in found:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ExampleError(place, f"{shown(tools)}; expected a list of tools (objects)")
    for place, tools in found[1:]:
        if not same_json(tools, found[0][1]):
            raise ExampleError(
                place, f"other tools than in {found[0][0]}: the two sides have different prompts"
            )
    return tuple(found[0][1]) if found else None


def split_conversations(chosen: Conversation, rejected: Conversation, tools: Tools, line: int) -> ChatExample:
    """Split two whole conversations where they stop being the same, which must be at an assistant turn."""
    for side in (chosen, rejected):
        _expect_assistant(side, len(side.messages) - 1, "the last turn")
    shared = _shared_length(chosen.messages, rejected.messages)
    shorter = min(len(chosen.messages), len(rejected.messages))
    if shared == len(chosen.messages) == len(rejected.messages):
        raise ExampleError(
            rejected.places[-1], "chosen and rejected are identical: there is nothing to prefer"
        )
    # Where one side is the start of the other, its last turn is the response: a response is never empty.
    start = min(shared, shorter - 1)
    _refuse_different_prompts(chosen, rejected, start)
    if start == 0:
        raise ExampleError(rejected.places[0], "no prompt: both sides start with an assistant turn")
    if not any(message["content"].strip() for message in chosen.messages[:start]):
        raise ExampleError(f"{chosen.places[start - 1]}.content", "the prompt is empty; nothing is asked")
    for side in (chosen, rejected):
        _refuse_empty_turns(side, start)
        _refuse_unscored_turns(side, start)
    prompt, *responses = (
        tuple(without_weight(turn) for turn in turns)
        for turns in (chosen.messages[:start], chosen.messages[start:], rejected.messages[start:])
    )
    return ChatExample(prompt, responses[0], responses[1], tools, line)


def _refuse_unscored_turns(side: Conversation, start: int) -> None:
    """The weights of OpenAI's chat rows choose the turns to learn; here that is every turn of the responses."""
    for place, turn in zip(side.places[start:], side.messages[start:], strict=True):
        if turn["role"] == "assistant" and turn.get("weight") == 0:
            raise ExampleError(
                f"{place}.weight",
                "0 on a turn of the response, all of which are scored; make it part of the prompt",
            )


def without_weight(turn: Message) -> Message:
    """A message as templates see it."""
    return {name: value for name, value in turn.items() if name != "weight"}


def _shared_length(one: Messages, other: Messages) -> int:
    """Number of messages that are the same at the start of both."""
    shared = 0
    while shared < min(len(one), len(other)) and same_json(
        *(without_weight(turns[shared]) for turns in (one, other))
    ):
        shared += 1
    return shared


def _refuse_different_prompts(chosen: Conversation, rejected: Conversation, start: int) -> None:
    """Both sides must go on with the assistant, and from there be asked the same things."""
    for one, other in ((rejected, chosen), (chosen, rejected)):
        role = one.messages[start]["role"]
        if role != "assistant":
            _refuse_turns((one.places[start], one.messages[start]), other.messages[start])
    asked = [
        [
            (place, turn)
            for place, turn in zip(side.places, side.messages, strict=True)
            if turn["role"] in ASKING_ROLES
        ]
        for side in (chosen, rejected)
    ]
    for (_, one_turn), (place, other_turn) in zip(*asked, strict=False):
        if not same_json(without_weight(one_turn), without_weight(other_turn)):
            _refuse_turns((place, other_turn), one_turn)
    if len(asked[0]) != len(asked[1]):
        place, turn = max(asked, key=len)[min(len(turns) for turns in asked)]
        raise ExampleError(place, f"different prompts: this {turn['role']} turn is on one side only")


def _refuse_turns(here: tuple[str, Message], there: Message) -> NoReturn:
    place, turn = here
    if turn["role"] != there["role"]:
        reason = f"a turn of role {turn['role']} here, of role {there['role']} on the other side"
    elif turn["content"] != there["content"]:
        at = _first_difference(turn["content"], there["content"])
        here_text, there_text = excerpt(turn["content"], at), excerpt(there["content"], at)
        reason = f"from character {at} on {here_text} here, {there_text} on the other side"
    else:
        reason = f"the {turn['role']} turns have the same content but other fields"
    raise ExampleError(place, f"different prompts: {reason}")


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refuse_empty_turns(side: Conversation, start: int) -> None:
    for place, turn in zip(side.places[start:], side.messages[start:], strict=True):
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise ExampleError(
                f"{place}.content", f"{shown(turn['content'])}: an empty response cannot be learned from"
            )


def _expect_assistant(side: Conversation, index: int, which: str) -> None:
    """Refuse a turn that is not the assistant's; `which` says which turn that is."""
    role = side.messages[index]["role"]
    if role != "assistant":
        raise ExampleError(f"{side.places[index]}.role", f"{which} is of role {role!r}; expected 'assistant'")


def refuse_what_messages_leave_out(row: Row, prompt: Messages, *keys: str) -> None:
    """Public data sets repeat a turn of the conversation beside it; anything else there would get lost."""
    for key in keys:
        beside = row.get(key)
        if beside and not isinstance(beside, str):
            raise ExampleError(key, f"{shown(beside)} beside whole conversations; put it into them")
        if beside and beside.strip() not in [message["content"].strip() for message in prompt]:
            raise ExampleError(key, f"{shown(beside)} is no turn of the conversations; put it into them")
