"""What a preview says of rows: every token of what the model will see, with its text."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from data_files import pair, write
from toy_tokenizers import OF_NAMES_AND_COLONS, byte_fallback_tokenizer, byte_tokenizer

from training.utils.data_preview import Preview, ShownText, previews
from training.utils.jsonl import located_rows
from training.utils.rendering import Renderer
from training.utils.row_kinds import kind_of
from training.utils.row_outcomes import Rendering

ROWS: dict[str, Any] = {
    "messages": pair("Où est 😀?", "ici 你好", "no  where\n"),
    "texts": {"chosen": "one two 😀 three", "rejected": "one two 你"},
    "a prompt and texts": {"prompt": "a b: ", "chosen": " c 你", "rejected": "d"},
    "a list": {"prompt": "ask ", "completions": ["x😀", "b", "c d"], "ranks": [1, 2, 3]},
    "supervised": {"prompt": "one ", "completion": " two 😀"},
}
BYTES, FALLBACK = byte_tokenizer(), byte_fallback_tokenizer(OF_NAMES_AND_COLONS)


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [*((BYTES, name) for name in ROWS), *((FALLBACK, name) for name in ("messages", "texts"))],
    ids=[*(f"bytes, {name}" for name in ROWS), "byte fallback, messages", "byte fallback, texts"],
)
@pytest.mark.parametrize("cut", [0, 2], ids=["whole", "cut"])
def test_the_texts_of_prompt_and_answer_are_the_decoded_sequence(
    tmp_path: Any, tokenizer: Any, name: str, cut: int
) -> None:
    path, renderer = write(tmp_path, [ROWS[name]]), Renderer(tokenizer)
    kind = kind_of([path])
    (located,) = located_rows(path)
    sides = kind.render(located, renderer).answers.sides
    longest = max(len(side.tokens) for side in sides.values()) - cut
    (row,) = previews(path, renderer, kind, Rendering(longest, "response_end"), 1)
    parts = {part.name: part for part in row.parts}
    prompt = parts.pop("prompt").tokens if "prompt" in parts else ()
    assert parts.keys() == sides.keys()
    assert sum(part.cut for part in parts.values()) >= cut
    for side, part in parts.items():
        shown, expected = (*prompt, *part.tokens), sides[side].tokens[:longest]
        assert "".join(token.text for token in shown) == tokenizer.decode(list(expected))
        assert tuple(token.id for token in shown) == expected
        assert [token.scored for token in shown] == sides[side].mask[:longest].astype(bool).tolist()


def previewed(tmp_path: Any, *rows: Any) -> list[Preview]:
    path = write(tmp_path, [*rows])
    return list(previews(path, Renderer(byte_tokenizer()), kind_of([path]), Rendering(), len(rows)))


def test_the_tokens_of_a_character_are_one_text_and_counted(tmp_path: Any) -> None:
    (row,) = previewed(tmp_path, ROWS["a prompt and texts"])
    chosen = row.parts[1]
    end = ShownText("<|im_end|>", 1, True)
    assert list(chosen.texts) == [
        *[ShownText(letter, 1, True) for letter in " c "],
        ShownText("你", 3, True),
        end,
    ]
    assert [token.unfinished for token in chosen.tokens] == [False] * 3 + [True, True] + [False] * 2
    assert len(chosen.tokens) == chosen.scored == 7


def test_a_prompt_that_ends_inside_a_character_leaves_its_text_to_the_answers(tmp_path: Any) -> None:
    """Of two whole texts the prompt is what they share, counted in tokens: here three of four bytes."""
    (row,) = previewed(tmp_path, {"chosen": "ab😀", "rejected": "ab😁"})
    prompt, chosen, rejected = row.parts
    assert list(prompt.texts) == [
        ShownText("a", 1, False),
        ShownText("b", 1, False),
        ShownText("", 3, False),
    ]
    assert [next(part.texts) for part in (chosen, rejected)] == [
        ShownText("😀", 1, True),
        ShownText("😁", 1, True),
    ]


def test_rows_that_make_no_pair_stand_between_those_that_do(tmp_path: Any) -> None:
    found = previewed(
        tmp_path,
        ROWS["a prompt and texts"],
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        ROWS["a prompt and texts"],
    )
    assert [(row.line, bool(row.problem)) for row in islice(found, 3)] == [(1, False), (2, True), (3, False)]
