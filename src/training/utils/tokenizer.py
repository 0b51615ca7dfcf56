"""Tokenizers: loading one, what decides its tokens, and comparing what it gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from firesteel import store
from firesteel.catalog import load_catalog
from firesteel.fetching import shown_on_stderr
from firesteel.sdk.errors import ModelError

Tokens = tuple[int, ...]


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
        self,
        conversation: Any,
        *,
        tools: Any,
        add_generation_prompt: bool,
        tokenize: bool,
        chat_template: Any,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
    ) -> Any:
        """The text of a conversation; or its tokens, and which of them the template marks as the assistant's."""
        ...


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


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """The tokens of a text, without any that the tokenizer would put around it."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def shown_text(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text of some tokens, quoted, for an error."""
    return json.dumps(str(tokenizer.decode(list(tokens))), ensure_ascii=False)


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Number of tokens (or characters) that are the same at the start of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def starts_with(tokens: Tokens, start: Tokens) -> bool:
    """Whether the first tokens are these."""
    return tokens[: len(start)] == start
