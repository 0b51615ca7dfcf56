"""What a preference says, written as a row of each form that `preference_data` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from training.utils.preference_examples import (
    ChatExample,
    ExampleError,
    PlainExample,
    PreferenceExample,
    RankedExample,
    TextExample,
)
from training.utils.row_extras import CHOSEN_SCORE, REJECTED_SCORE, NewRow, score_of, tools_beside


def write_preference(example: PreferenceExample, form: str, scores: Mapping[str, float]) -> NewRow:
    """The row of a form, with the scores of its two answers, if they have any. Raises ExampleError."""
    if form in _OF_LISTS:
        return _OF_LISTS[form](example if isinstance(example, RankedExample) else _as_list(example, scores))
    return _OF_PAIRS[form](as_pair(example)) | dict(scores)


def as_pair(example: PreferenceExample) -> ChatExample | PlainExample | TextExample:
    """The same preference without ranks. Raises ExampleError for a list of more than two answers."""
    if not isinstance(example, RankedExample):
        return example
    if len(example.answers) > 2:
        raise ExampleError("row", f"ranks {len(example.answers)} answers, and that form holds two")
    chosen, rejected = example.answers
    if isinstance(example.prompt, str):
        return PlainExample(example.prompt, str(chosen), str(rejected), example.line)
    turns = [() if isinstance(answer, str) else answer for answer in (chosen, rejected)]
    return ChatExample(example.prompt, turns[0], turns[1], example.tools, example.line)


def _as_list(example: ChatExample | PlainExample | TextExample, scores: Mapping[str, float]) -> RankedExample:
    """Two answers as a list; a whole text stands as an answer after an empty one."""
    better, worse = scores.get(CHOSEN_SCORE, 1.0), scores.get(REJECTED_SCORE, 0.0)
    if better <= worse:
        raise ExampleError(CHOSEN_SCORE, f"{better:g}, and that of the rejected side is {worse:g}")
    prompt = "" if isinstance(example, TextExample) else example.prompt
    tools = example.tools if isinstance(example, ChatExample) else None
    return RankedExample(prompt, (example.chosen, example.rejected), (-better, -worse), tools, example.line)


def _chat(example: PreferenceExample) -> ChatExample:
    if not isinstance(example, ChatExample):
        raise ExampleError(
            "row", "holds texts, and that form messages: a chat template would be added to them"
        )
    return example


def _as_messages(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    chosen, rejected = ({"messages": [*chat.prompt, *side]} for side in (chat.chosen, chat.rejected))
    return {"chosen": chosen, "rejected": rejected} | tools_beside(chat.tools)


def _as_preferred_output(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    given = {"messages": list(chat.prompt)} | tools_beside(chat.tools)
    outputs = {"preferred_output": list(chat.chosen), "non_preferred_output": list(chat.rejected)}
    return {"input": given, **outputs}


def _as_prompt_messages(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    row = {"prompt": list(chat.prompt), "chosen": list(chat.chosen), "rejected": list(chat.rejected)}
    return row | tools_beside(chat.tools)


def _as_message_lists(example: PreferenceExample) -> NewRow:
    chat = _chat(example)
    chosen, rejected = ([*chat.prompt, *side] for side in (chat.chosen, chat.rejected))
    return {"chosen": chosen, "rejected": rejected} | tools_beside(chat.tools)


def _as_prompt_text(example: PreferenceExample) -> NewRow:
    if not isinstance(example, PlainExample):
        raise ExampleError("row", "has no prompt that is a text by itself, as that form has")
    return {"prompt": example.prompt, "chosen": example.chosen, "rejected": example.rejected}


def _as_text(example: PreferenceExample) -> NewRow:
    if not isinstance(example, TextExample):
        raise ExampleError("row", "is not two whole texts, as that form is")
    return {"chosen": {"text": example.chosen}, "rejected": {"text": example.rejected}}


def _as_samples(example: RankedExample) -> NewRow:
    samples: list[NewRow] = []
    for answer, rank in zip(example.answers, example.ranks, strict=True):
        if not isinstance(answer, str) and not isinstance(example.prompt, str):
            samples.append({"messages": [*example.prompt, *answer], "score": score_of(rank)})
        elif example.prompt == "":
            samples.append({"text": answer, "score": score_of(rank)})
        else:
            raise ExampleError("row", "has its prompt apart, and samples of texts have none")
    return {"samples": samples} | tools_beside(example.tools)


def _as_completions(example: RankedExample) -> NewRow:
    if example.prompt == "":
        raise ExampleError("row", "is two whole texts, and completions have their prompt apart")
    prompt = example.prompt if isinstance(example.prompt, str) else list(example.prompt)
    completions = [
        {"text": answer, "score": score_of(rank)}
        if isinstance(answer, str)
        else {"messages": list(answer), "score": score_of(rank)}
        for answer, rank in zip(example.answers, example.ranks, strict=True)
    ]
    return {"prompt": prompt, "completions": completions} | tools_beside(example.tools)


_OF_PAIRS: dict[str, Callable[[PreferenceExample], NewRow]] = {
    "messages": _as_messages,
    "preferred_output": _as_preferred_output,
    "prompt-messages": _as_prompt_messages,
    "message-lists": _as_message_lists,
    "prompt-text": _as_prompt_text,
    "text": _as_text,
}
_OF_LISTS: dict[str, Callable[[RankedExample], NewRow]] = {
    "samples": _as_samples,
    "completions": _as_completions,
}
LIST_FORMS = tuple(_OF_LISTS)
"""Those with a place for scores."""
PREFERENCE_FORMS = (*_OF_PAIRS, *LIST_FORMS)
"""What can be written: all that is read."""
