"""A toy model with random weights and one token per byte: what tests and first tries train in seconds.

Every run writes the same bytes. A byte's token id is the byte itself, so any text goes to ids and back
exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = 256
IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (IM_START, IM_END, PAD)  # ids from 256 on, in this order
VOCABULARY = 264  # bytes and special tokens, padded to a multiple of 8
MAX_POSITIONS = 8192  # tokens: rotary positions cost nothing, and guides ask for 4096

# Wide enough that logits differ by about one and attention is not uniform: with the usual 0.02 a wrong mask
# or position would change the numbers too little for a test to see.
_WEIGHT_STD = 0.15

# ChatML. Nothing is trimmed or added, so that a prompt rendered alone is a prefix of the whole conversation.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}
{%- if part.text is not defined -%}{{ raise_exception('this model reads text only') }}{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}{{ text(messages[0].content) + '\\n\\n' }}{%- endif -%}
{{ 'Tools:\\n' }}{%- for tool in tools -%}{{ tool | tojson + '\\n' }}{%- endfor -%}{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == 'system') -%}
{{ '<|im_start|>' + message.role + '\\n' + text(message.content) }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- set arguments = function.arguments or {} -%}
{{ '<tool_call>{"name": ' + function.name | tojson + ', "arguments": ' }}
{{- arguments if arguments is string else arguments | tojson }}
{{- '}</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build(folder: Path) -> None:
    """Write the model (0.6 MB, float32, safetensors) and its tokenizer into an existing folder."""
    _model().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _model() -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=_WEIGHT_STD,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=BYTES + SPECIAL_TOKENS.index(IM_END),
        pad_token_id=BYTES + SPECIAL_TOKENS.index(PAD),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # making the layers draws numbers; the caller's must not move
        model = LlamaForCausalLM(config)
    # Drawn here and not by transformers, whose order of drawing may change from version to version.
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            parameter.data = torch.ones(parameter.shape, dtype=torch.float32)  # the norms' scales
        else:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data = drawn * _WEIGHT_STD
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Without merges each byte stays a token, under the printable character that stands for it.
    vocabulary = {character: byte for byte, character in enumerate(_characters_of_bytes())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,  # it would change spaces before punctuation when decoding
    )


def _characters_of_bytes() -> list[str]:
    """The character by which `ByteLevel` writes each byte: itself where printable, else one from 256 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]
