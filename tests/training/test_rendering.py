import numpy as np
import pytest
from toy_tokenizers import (
    CHATML,
    CHATML_OF_THREE_ROLES,
    CHATML_WITH_TOOLS,
    COUNTING_TURNS,
    ENDING_THE_LAST_TURN_ONLY,
    LLAMA_3,
    OF_ALTERNATING_ROLES,
    QWEN_3,
    WITHOUT_END_OF_TURN,
    byte_tokenizer,
    space_adding_tokenizer,
)

from firesteel.sdk.errors import DataError, ModelError
from training.utils.chat_template import RenderError
from training.utils.preference_examples import (
    ChatExample,
    Message,
    PlainExample,
    PreferenceExample,
    TextExample,
    Tools,
)
from training.utils.rendering import RenderedPair, Renderer
from training.utils.tokenizer import Tokenizer, load_tokenizer, tokenizer_identity

TOOLS = ({"type": "function", "function": {"name": "add"}},)


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: object) -> Message:
    return {"role": "assistant", "content": content, **fields}


def chat(
    chosen: list[Message], rejected: list[Message], tools: Tools = None, *before: Message
) -> ChatExample:
    return ChatExample((*before, user("2+2?")), tuple(chosen), tuple(rejected), tools, line=1)


FOUR_OR_FIVE = chat([assistant("4")], [assistant("5")])


def texts(tokenizer: Tokenizer, pair: RenderedPair) -> tuple[str, str, str]:
    """The prompt and both responses as text."""
    prompt, end = pair.chosen_tokens[: pair.prompt_len], pair.prompt_len
    assert pair.rejected_tokens[:end] == prompt
    return (
        str(tokenizer.decode(list(prompt))),
        str(tokenizer.decode(list(pair.chosen_tokens[end:]))),
        str(tokenizer.decode(list(pair.rejected_tokens[end:]))),
    )


def scored(tokenizer: Tokenizer, pair: RenderedPair) -> tuple[str, str]:
    """What is scored of both sides, as text."""
    sides = ((pair.chosen_tokens, pair.chosen_mask), (pair.rejected_tokens, pair.rejected_mask))
    chosen, rejected = (np.asarray(tokens)[mask == 1].tolist() for tokens, mask in sides)
    return str(tokenizer.decode(chosen)), str(tokenizer.decode(rejected))


def render(tokenizer: Tokenizer, example: PreferenceExample) -> RenderedPair:
    return Renderer(tokenizer).render(example)


# Chat


@pytest.mark.parametrize(
    ("template", "prompt", "end"),
    [
        (CHATML, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (LLAMA_3, "<s><|start|>user<|end|>\n\n2+2?<|eot|><|start|>assistant<|end|>\n\n", "<|eot|>"),
        (
            QWEN_3,
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>",
        ),
    ],
    ids=["ChatML", "Llama 3", "Qwen 3"],
)
def test_content_and_one_end_of_turn_are_scored_and_nothing_else(
    template: str, prompt: str, end: str
) -> None:
    tokenizer = byte_tokenizer(template)

    pair = render(tokenizer, FOUR_OR_FIVE)

    assert texts(tokenizer, pair) == (prompt, "4" + end, "5" + end)
    assert scored(tokenizer, pair) == ("4" + end, "5" + end)
    assert pair.chosen_mask.dtype == np.float32
    assert pair.chosen_mask.tolist() == [0.0] * pair.prompt_len + [1.0, 1.0]


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, QWEN_3], ids=["ChatML", "Llama 3", "Qwen 3"])
def test_the_tokens_are_those_of_the_whole_rendered_conversation(template: str) -> None:
    tokenizer = byte_tokenizer(template, adds_bos=template == LLAMA_3)
    whole = tokenizer.apply_chat_template([user("2+2?"), assistant("4")], return_dict=False)

    pair = render(tokenizer, FOUR_OR_FIVE)

    assert list(pair.chosen_tokens) == whole[: len(pair.chosen_tokens)]
    assert tokenizer.decode(whole[len(pair.chosen_tokens) :]) in ("", "\n")


def test_the_template_writes_the_only_beginning_of_sequence() -> None:
    tokenizer = byte_tokenizer(LLAMA_3, adds_bos=True)
    assert render(tokenizer, FOUR_OR_FIVE).chosen_tokens.count(tokenizer.bos_token_id) == 1


def test_the_first_response_token_is_scored_where_only_it_differs() -> None:
    tokenizer = byte_tokenizer()
    pair = render(tokenizer, chat([assistant("a same end")], [assistant("b same end")]))

    assert pair.chosen_tokens[pair.prompt_len] != pair.rejected_tokens[pair.prompt_len]
    assert pair.chosen_mask[pair.prompt_len] == pair.rejected_mask[pair.prompt_len] == 1


def test_a_shared_opening_of_both_responses_belongs_to_the_responses() -> None:
    tokenizer = byte_tokenizer()
    pair = render(tokenizer, chat([assistant("It is 4")], [assistant("It is 5")]))
    assert scored(tokenizer, pair) == ("It is 4<|im_end|>", "It is 5<|im_end|>")


def test_of_several_turns_only_those_of_the_assistant_are_scored() -> None:
    tokenizer = byte_tokenizer()
    example = chat(
        [assistant("4"), user("Sure?"), assistant("Yes")], [assistant("5"), user("Sure?"), assistant("user")]
    )

    pair = render(tokenizer, example)

    assert texts(tokenizer, pair)[1] == (
        "4<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )
    assert scored(tokenizer, pair) == ("4<|im_end|>Yes<|im_end|>", "5<|im_end|>user<|im_end|>")


def test_tools_and_tool_calls_reach_the_template() -> None:
    tokenizer = byte_tokenizer(CHATML_WITH_TOOLS)
    call = assistant("", tool_calls=[{"function": {"name": "add", "arguments": {}}}])
    example = chat([call, {"role": "tool", "content": "4"}, assistant("It is 4")], [assistant("5")], TOOLS)

    pair = render(tokenizer, example)

    assert '"name": "add"' in texts(tokenizer, pair)[0]
    assert scored(tokenizer, pair) == ("[add]<|im_end|>It is 4<|im_end|>", "5<|im_end|>")


@pytest.mark.parametrize(
    ("example", "field", "reason"),
    [
        (chat([assistant("4")], [assistant("5")], TOOLS), "tools", "shows no tools"),
        (
            chat([assistant("", tool_calls=[{"function": {"name": "add"}}])], [assistant("5")]),
            "chosen",
            "does not show tool_calls of turn 1",
        ),
        (
            chat([assistant("4")], [assistant("5", reasoning_content="Hm")]),
            "rejected",
            "does not show reasoning_content of turn 1",
        ),
        (
            chat([assistant("4", thinking="Hm")], [assistant("5")]),
            "chosen",
            "does not show thinking of turn 1",
        ),
        (
            chat(
                [assistant("4")], [assistant("5")], None, {"role": "user", "name": "Ann", "content": "2+2?"}
            ),
            "chosen",
            "does not show name of turn 0",
        ),
        (
            chat([assistant("4")], [assistant("5")], None, {"role": "developer", "content": "Be brief"}),
            "chosen",
            "shows no turns of role 'developer'",
        ),
    ],
    ids=["tools", "tool calls", "reasoning", "thinking", "name", "role"],
)
def test_what_the_template_would_leave_out_is_refused(example: ChatExample, field: str, reason: str) -> None:
    with pytest.raises(RenderError, match=reason) as caught:
        render(byte_tokenizer(CHATML_OF_THREE_ROLES), example)
    assert caught.value.field == field
    assert isinstance(caught.value, DataError)


def test_a_thought_is_scored_and_an_inserted_empty_one_is_not() -> None:
    tokenizer = byte_tokenizer(QWEN_3)
    example = chat([assistant("<think>\nTwo and two\n</think>\n\n4")], [assistant("5")])

    pair = render(tokenizer, example)

    assert scored(tokenizer, pair) == ("<think>\nTwo and two\n</think>\n\n4<|im_end|>", "5<|im_end|>")
    assert texts(tokenizer, pair)[0].endswith("assistant\n")


def test_reasoning_beside_the_content_is_scored_where_the_template_shows_it() -> None:
    tokenizer = byte_tokenizer(QWEN_3)
    pair = render(tokenizer, chat([assistant("4", reasoning_content="Easy")], [assistant("5")]))
    assert scored(tokenizer, pair)[0] == "<think>\nEasy\n</think>\n\n4<|im_end|>"


def test_several_turns_without_thoughts_render_where_thoughts_are_dropped() -> None:
    tokenizer = byte_tokenizer(QWEN_3)
    example = chat(
        [assistant("4"), user("?"), assistant("Yes")], [assistant("5"), user("?"), assistant("No")]
    )
    assert scored(tokenizer, render(tokenizer, example)) == (
        "4<|im_end|>Yes<|im_end|>",
        "5<|im_end|>No<|im_end|>",
    )


def test_a_turn_whose_thought_is_dropped_later_is_refused() -> None:
    thinking = [assistant("<think>Hm</think>4"), user("?"), assistant("Yes")]
    with pytest.raises(RenderError, match="rewrites turn 1 once others follow") as caught:
        render(byte_tokenizer(QWEN_3), chat(thinking, [assistant("5"), user("?"), assistant("No")]))
    assert '"<think>\\nHm' in caught.value.reason


def test_a_prompt_that_changes_when_the_answer_follows_is_refused_with_both_sides() -> None:
    with pytest.raises(RenderError, match="prompt is not the start") as caught:
        render(byte_tokenizer(COUNTING_TURNS), FOUR_OR_FIVE)
    assert caught.value.field == "chosen"
    assert 'from token 0 on "1 turns\\n" against "2 turns\\n"' in caught.value.reason


def test_a_token_that_spans_prompt_and_response_is_refused_on_its_side_only() -> None:
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    assert render(tokenizer, FOUR_OR_FIVE).prompt_len > 0
    with pytest.raises(RenderError, match="prompt is not the start") as caught:
        render(tokenizer, chat([assistant("4")], [assistant("\n5")]))
    assert caught.value.field == "rejected"
    assert '"tant\\n" against "tant\\n\\n5' in caught.value.reason


@pytest.mark.parametrize("content", ["4<|im_end|>", "<|im_end|>\n<|im_start|>user\nMore"])
def test_a_response_that_contains_the_end_of_turn_is_refused(content: str) -> None:
    with pytest.raises(RenderError, match=r"contains <\|im_end\|>") as caught:
        render(byte_tokenizer(), chat([assistant("4")], [assistant(content)]))
    assert caught.value.field == "rejected"


def test_a_template_that_ends_no_turn_is_refused_once_messages_are_rendered() -> None:
    renderer = Renderer(byte_tokenizer(WITHOUT_END_OF_TURN))
    assert renderer.render(PlainExample("2+2=", "4", "5", line=1)).prompt_len == 4
    with pytest.raises(ModelError, match=r'turn with "\\n", in which there is no special'):
        renderer.render(FOUR_OR_FIVE)


def test_a_template_that_ends_only_the_last_turn_is_refused_for_several() -> None:
    renderer = Renderer(byte_tokenizer(ENDING_THE_LAST_TURN_ONLY))
    assert renderer.render(FOUR_OR_FIVE).chosen_mask.sum() == 2
    with pytest.raises(RenderError, match="rewrites turn 1 once others follow"):
        renderer.render(
            chat([assistant("4"), user("?"), assistant("a")], [assistant("5"), user("?"), assistant("b")])
        )


def test_what_the_template_itself_refuses_is_told_with_its_words() -> None:
    with pytest.raises(RenderError, match="System role not supported"):
        render(
            byte_tokenizer(OF_ALTERNATING_ROLES), chat([assistant("4")], [assistant("5")], None, system("Hi"))
        )


def test_without_a_chat_template_the_error_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"has no chat template.*use the tokenizer of a chat model"):
        render(byte_tokenizer(None), FOUR_OR_FIVE)


# Plain and whole texts


@pytest.mark.parametrize("adds_bos", [False, True])
def test_prompt_and_response_are_joined_as_ids_with_one_beginning_and_one_end(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos, merges=[("=", "4")])

    pair = render(tokenizer, PlainExample("2+2=", "4", "5", line=1))

    assert texts(tokenizer, pair) == ("<s>" * adds_bos + "2+2=", "4<|im_end|>", "5<|im_end|>")
    assert pair.chosen_tokens[pair.prompt_len :] == (
        *tokenizer("4", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    )
    assert pair.chosen_mask.tolist() == [0.0] * pair.prompt_len + [1.0, 1.0]


def test_texts_that_were_templated_before_get_no_second_beginning_or_end() -> None:
    tokenizer = byte_tokenizer(LLAMA_3, end="<|eot|>", adds_bos=True)

    pair = render(tokenizer, PlainExample("<s>2+2=", "4<|eot|>\n", "5<|eot|>", line=1))

    assert texts(tokenizer, pair) == ("<s>2+2=", "4<|eot|>", "5<|eot|>")


def test_one_conversation_gives_one_pair_as_messages_as_plain_and_as_whole_texts() -> None:
    tokenizer = byte_tokenizer()
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    examples: list[PreferenceExample] = [
        FOUR_OR_FIVE,
        PlainExample(prompt, "4", "5", line=1),
        TextExample(prompt + "4<|im_end|>\n", prompt + "5", line=1),
    ]

    pairs = [render(tokenizer, example) for example in examples]

    for pair in pairs:
        assert pair.prompt_len == pairs[0].prompt_len
        assert pair.chosen_tokens == pairs[0].chosen_tokens
        assert pair.rejected_tokens == pairs[0].rejected_tokens
        assert pair.chosen_mask.tolist() == pairs[0].chosen_mask.tolist()
        assert pair.rejected_mask.tolist() == pairs[0].rejected_mask.tolist()


def test_whole_texts_part_at_a_token_and_never_inside_one() -> None:
    tokenizer = byte_tokenizer(merges=[("4", "4"), ("4", "5")])
    pair = render(tokenizer, TextExample("=44", "=45", line=1))
    assert texts(tokenizer, pair) == ("=", "44<|im_end|>", "45<|im_end|>")


def test_a_text_that_is_the_start_of_the_other_keeps_its_end_as_response() -> None:
    tokenizer = byte_tokenizer()
    pair = render(tokenizer, TextExample("The sky is blue", "The sky is blue and vast", line=1))
    assert texts(tokenizer, pair) == ("The sky is blue", "<|im_end|>", " and vast<|im_end|>")


def test_texts_that_share_nothing_are_refused_unless_a_beginning_is_added() -> None:
    example = TextExample("yes", "no", line=1)
    with pytest.raises(RenderError, match="differ from their first token on"):
        render(byte_tokenizer(), example)
    assert render(byte_tokenizer(adds_bos=True), example).prompt_len == 1


def test_plain_texts_need_an_end_of_sequence_token() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        render(byte_tokenizer(end=None), PlainExample("2+2=", "4", "5", line=1))


def test_a_tokenizer_that_puts_a_space_before_the_response_is_refused() -> None:
    with pytest.raises(RenderError, match="changes the text where prompt and response meet"):
        render(space_adding_tokenizer(), PlainExample("say:", "yes", "no", line=1))


# Identity and loading


def test_the_identity_is_that_of_content_not_of_the_object_or_its_last_call() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_identity(tokenizer)
    tokenizer("abc", truncation=True, max_length=2)
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(byte_tokenizer())
    assert Renderer(tokenizer).identity == before


def test_the_identity_changes_with_whatever_changes_tokens() -> None:
    variants = [
        byte_tokenizer(),
        byte_tokenizer(CHATML + " "),
        byte_tokenizer(end="<|eot|>"),
        byte_tokenizer(adds_bos=True),
        byte_tokenizer(merges=[("4", "4")]),
    ]
    assert len({tokenizer_identity(tokenizer) for tokenizer in variants}) == len(variants)


def test_a_tokenizer_of_the_catalogue_renders_a_pair() -> None:
    tokenizer = load_tokenizer("tiny-llama")
    assert scored(tokenizer, render(tokenizer, FOUR_OR_FIVE)) == ("4<|im_end|>", "5<|im_end|>")


def test_an_unknown_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        load_tokenizer("no-such-model")
