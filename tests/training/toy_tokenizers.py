"""Tokenizers that are built in a moment: one token per byte unless merges are given, any chat template."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '[' + call.function.name + ']' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Says itself what the assistant writes.
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Knows three roles only, like many templates, and says nothing about the others.
CHATML_OF_THREE_ROLES = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message.role in ['system', 'user', 'assistant'] %}",
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message.role + '<|end|>\\n\\n' + message.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
# As Qwen3's: reasoning is kept in the last turn only, where an empty block stands for none.
QWEN_3 = """\
{%- for message in messages -%}
{%- set parts = message.content.split('</think>') -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last -%}
{%- set thought = parts[0].split('<think>')[-1] if parts | length > 1 else message.reasoning_content or '' -%}
{{ '<think>\\n' + thought.strip() + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
COUNTING_TURNS = "{{ messages | length ~ ' turns\\n' }}" + CHATML
WITHOUT_END_OF_TURN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OF_NAMES_AND_COLONS = (
    "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
ENDING_THE_LAST_TURN_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OF_ALTERNATING_ROLES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<think>", "</think>")


def byte_tokenizer(
    template: str | None = CHATML,
    *,
    end: str | None = "<|im_end|>",
    adds_bos: bool = False,
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Bytes, then `merges` (in the characters `ByteLevel` writes bytes with), then the special tokens."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*characters, *(left + right for left, right in merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if adds_bos or template == LLAMA_3 else None,
        eos_token=end,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def space_adding_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a space before every text it is given, as those of the first Llamas do."""
    letters = {character: index for index, character in enumerate("▁abcdefghijklmnopqrstuvwxyz:")}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "</s>": len(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """As that of Llama 2: letters, and what else there is as bytes; a space before every text, which decoding drops."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", *bytes_, *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "ab"]
    ids = {token: index for index, token in enumerate(vocabulary)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)
