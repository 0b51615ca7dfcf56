"""The same preference, or the same conversation, as a row of every accepted form, written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Row = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4", "name": "add"}

WORDS = st.text("aé😀\n <|\"\\{'", min_size=1, max_size=6).filter(str.strip)
BESIDE = st.fixed_dictionaries({}, optional={"id": st.just("row 1"), "source": WORDS, "weight": st.just(2.5)})


def said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Question:
    """What is asked, after a system prompt and earlier exchanges, if there are any."""

    system: str | None
    earlier: list[tuple[str, str]]
    asked: str

    @property
    def turns(self) -> list[Row]:
        system = [said("system", self.system)] if self.system else []
        earlier = [said(r, t) for e in self.earlier for r, t in zip(("user", "assistant"), e, strict=True)]
        return [*system, *earlier, said("user", self.asked)]


QUESTIONS = st.builds(Question, st.none() | WORDS, st.lists(st.tuples(WORDS, WORDS), max_size=2), asked=WORDS)


@st.composite
def answers(draw: st.DrawFn, least: int = 2, most: int = 2) -> list[str]:
    """Best first; templates may strip them, and still no two are the same."""
    return draw(st.lists(WORDS, min_size=least, max_size=most, unique_by=str.strip))


def chats(question: Question, best: str, worst: str, *, calling: bool) -> Iterator[Row]:
    """A preference between two answers; the better one may call a tool first."""
    prompt, rejected = question.turns, [said("assistant", worst)]
    chosen = [*([CALL, RESULT] if calling else []), said("assistant", best)]
    tools = {"tools": TOOLS} if calling else {}
    lists = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
    yield {name: {"messages": turns, **tools} for name, turns in lists.items()}
    yield lists | tools
    yield {"prompt": prompt, "chosen": chosen, "rejected": rejected} | tools
    given = {"messages": prompt} | tools
    yield {"input": given, "preferred_output": chosen, "non_preferred_output": rejected}
    scored = [{"messages": turns, "score": s} for s, turns in enumerate((lists["rejected"], lists["chosen"]))]
    yield {"samples": scored} | tools
    yield {"prompt": prompt, "completions": [rejected, chosen], "ranks": [2, 1]} | tools


def plain_texts(best: str, worst: str) -> Iterator[Row]:
    """The same of a text that goes on in two ways."""
    yield {"prompt": "Q:", "chosen": best, "rejected": worst}
    yield {"prompt": "Q:", "completions": [worst, best], "scores": [0, 1]}


def whole_texts(best: str, worst: str) -> Iterator[Row]:
    """The same of two texts that begin in the same way."""
    best, worst = f"Q: {best}", f"Q: {worst}"
    yield {"chosen": best, "rejected": {"text": worst}}
    yield {"samples": [{"text": worst, "score": 0}, {"text": best, "evals": {"score": 1}}]}


def chat_lists(question: Question, ranked: Sequence[str]) -> Iterator[Row]:
    """Several answers, best first."""
    prompt = question.turns
    scored = [
        {"messages": [*prompt, said("assistant", answer)], "score": -rank}
        for rank, answer in enumerate(ranked)
    ]
    yield {"samples": scored[::-1]}
    yield {"prompt": prompt, "completions": list(ranked), "ranks": [*range(len(ranked))]}


def conversations(question: Question, answer: str, *, learned: bool) -> Iterator[Row]:
    """A supervised conversation whose earlier answers are learned too, or not."""
    weight = {} if learned else {"weight": 0}
    turns = [turn | (weight if turn["role"] == "assistant" else {}) for turn in question.turns]
    last = said("assistant", answer)
    yield {"messages": [*turns, last]}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    named = [
        {"from": names[turn["role"]], "value": turn["content"]}
        | {key: bool(turn[key]) for key in turn if key == "weight"}
        for turn in (*turns, last)
    ]
    told = [{("train" if key == "weight" else key): value for key, value in turn.items()} for turn in named]
    yield {"conversations": told}
    if not learned or not question.earlier:
        yield {"prompt": question.turns, "completion": [last]}
    if learned or not question.earlier:
        history = {"history": [list(exchange) for exchange in question.earlier]} if question.earlier else {}
        system = {"system": question.system} if question.system else {}
        yield {"instruction": question.asked, "output": answer} | system | history
