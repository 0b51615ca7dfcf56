"""The texts of tokens: behind each other they are the text of the whole, and none is torn inside a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_fallback_tokenizer, byte_tokenizer, space_adding_tokenizer
from transformers import PreTrainedTokenizerFast

from training.utils.token_texts import TokenText, token_texts
from training.utils.tokenizer import encode


def cleaning_tokenizer() -> PreTrainedTokenizerFast:
    """It removes spaces before punctuation when it decodes, wherever they are from."""
    tokenizer = byte_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "bytes": byte_tokenizer(),
    "merged bytes": byte_tokenizer(merges=[("Ġ", "a"), ("a", "b"), ("b", "ð"), ("Ł", "ĺ"), ("a", "Ċ")]),
    "spaces": space_adding_tokenizer(),
    "byte fallback": byte_fallback_tokenizer(),
    "clean up": cleaning_tokenizer(),
}
named = pytest.mark.parametrize("name", TOKENIZERS)
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
texts = st.text(st.one_of(st.sampled_from("ab :.\n😀你é"), characters), max_size=30)


@named
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_texts_behind_each_other_are_the_decoded_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    of_a_text = texts.map(lambda text: encode(tokenizer, text))
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=30)  # bytes that are no character, too
    tokens = data.draw(st.one_of(of_a_text, anything))
    found = token_texts(tokenizer, tokens)
    assert "".join(each.text for each in found) == tokenizer.decode(tokens)
    assert sum(each.tokens for each in found) == len(tokens)
    assert all(each.tokens > 0 for each in found)


@pytest.mark.parametrize("name", ["bytes", "byte fallback"])
@settings(deadline=None, max_examples=60)
@given(text=st.text(characters.filter(lambda letter: not letter.isascii()), max_size=20))
def test_the_bytes_of_a_character_are_told_together(name: str, text: str) -> None:
    found = token_texts(TOKENIZERS[name], encode(TOKENIZERS[name], text))
    if name == "byte fallback" and text:
        assert found.pop(0) == TokenText("", 1)  # the space before the text, which decoding drops
    assert found == [TokenText(letter, len(letter.encode())) for letter in text]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("bytes", "a b", ["a", " ", "b"]),
        ("merged bytes", "c ab", ["c", " a", "b"]),
        ("merged bytes", "ab😀a", ["ab", "😀", "a"]),
        ("spaces", "a b", ["", "a", " ", "b"]),
        ("byte fallback", "ab a  ab", ["a", "b", " a", " ", " a", "b"]),
        ("byte fallback", "b😀你 a", ["", "b", "😀", "你", " a"]),
        ("clean up", "a .b", ["a", ".", "b"]),
    ],
)
def test_a_token_keeps_the_space_that_it_has_among_others(name: str, text: str, expected: list[str]) -> None:
    found = token_texts(TOKENIZERS[name], encode(TOKENIZERS[name], text))
    assert [each.text for each in found] == expected


def test_a_token_that_ends_a_character_and_begins_another_is_told_with_both() -> None:
    tokenizer = byte_tokenizer(merges=[("Ģ", "ð")])
    assert token_texts(tokenizer, encode(tokenizer, "a😀😀b")) == [
        TokenText("a", 1),
        TokenText("😀😀", 7),
        TokenText("b", 1),
    ]


@pytest.mark.parametrize("name", ["bytes", "byte fallback"])
def test_what_is_cut_inside_a_character_is_told_as_no_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = token_texts(tokenizer, encode(tokenizer, "ab😀")[:-1])
    assert {each.text for each in found[-1:]} == {"\ufffd"}
    assert "".join(each.text for each in found).startswith("ab\ufffd")


def test_a_sign_that_stands_for_no_character_is_one_too() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert token_texts(tokenizer, encode(tokenizer, "a\ufffdb")) == [
        TokenText("a", 1),
        TokenText("\ufffd", 3),
        TokenText("b", 1),
    ]


def test_of_no_tokens_there_is_no_text() -> None:
    assert token_texts(TOKENIZERS["bytes"], ()) == []


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.decoded = 0

    def decode(self, tokens: Sequence[int]) -> str:
        self.decoded += len(tokens)
        return str(self.tokenizer.decode(tokens))


def test_bytes_that_turn_a_character_before_them_into_none_are_told_in_order() -> None:
    """As Llama 2 decodes: in a row of bytes that is no text, no byte is one, though three of these are at first."""
    tokenizer = TOKENIZERS["byte fallback"]
    for more in ([], encode(tokenizer, "b")):
        tokens = [
            *(tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in (*"你".encode(), 0xFF)),
            *more,
        ]
        found = token_texts(tokenizer, tokens)
        assert "".join(each.text for each in found) == tokenizer.decode(tokens)
        assert sum(each.tokens for each in found) == len(tokens)


@named
def test_the_work_grows_with_the_tokens_and_not_with_their_square(name: str) -> None:
    sizes = (300, 1200)
    decoded = []
    for size in sizes:
        counting: Any = Counting(TOKENIZERS[name])
        text = "ab a: 😀你 zz ." if name != "spaces" else "ab a: zz"
        tokens = encode(counting.tokenizer, text * size)[:size]
        while (counting.tokenizer.decode(tokens)).endswith("\ufffd"):
            tokens = tokens[:-1]
        token_texts(counting, tokens)
        decoded.append(counting.decoded)
    assert decoded[1] / decoded[0] < 1.1 * sizes[1] / sizes[0]


def test_so_it_does_where_a_character_of_several_tokens_looks_like_bytes_that_are_none() -> None:
    decoded = []
    for size in (300, 1200):
        counting: Any = Counting(TOKENIZERS["bytes"])
        token_texts(counting, encode(counting.tokenizer, "a\ufffdb" * (size // 5)))
        decoded.append(counting.decoded)
    assert decoded[1] / decoded[0] < 1.1 * 4


class Looking:
    """A tokenizer whose every letter depends on how many tokens stand before it."""

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(ord("a") + (token + place) % 26) for place, token in enumerate(tokens))


def test_of_a_decoder_that_looks_back_to_the_start_the_texts_are_right_too() -> None:
    looking: Any = Looking()
    tokens = [0] * 100
    assert token_texts(looking, tokens) == [TokenText(letter, 1) for letter in looking.decode(tokens)]
