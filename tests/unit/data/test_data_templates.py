"""Which tokens a row becomes and which of them are scored."""

import copy

import pytest
from tokenizers import processors

from eetrain.data import Chat, PromptResponse, Row, Text
from eetrain.data.tokenization import TextEncoder, TokenTable, load_tokenizer
from eetrain.errors import ConfigError, DataError

ROW = Row({"mr": "name[The Eagle], food[Japanese]", "ref": "The Eagle serves food."}, "f.csv:2")
TEMPLATE = {"prompt": "{mr}\n=> ", "response": "{ref}"}


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_response_is_bos_prompt_response_eos_scored_on_the_latter_two(tokenizer):
    [example] = PromptResponse(**TEMPLATE).encode([ROW], TextEncoder(tokenizer))
    prompt = [1, *_ids(tokenizer, "name[The Eagle], food[Japanese]\n=> ")]
    response = [*_ids(tokenizer, "The Eagle serves food."), 2]
    assert example.ids == prompt + response
    assert example.scored == [False] * len(prompt) + [True] * len(response)
    assert example.origin == "f.csv:2"


def test_prompt_is_tokenised_as_at_decode_time_even_where_one_text_would_merge(tokenizer):
    encoder = TextEncoder(tokenizer)
    template = PromptResponse(**TEMPLATE)
    [example] = template.encode([ROW], encoder)
    prompt = template.prompt_ids(ROW, encoder)
    assert example.ids[: len(prompt)] == prompt
    # The trap is real here: the text as a whole merges the space before the response into its first word.
    whole = [1, *_ids(tokenizer, "name[The Eagle], food[Japanese]\n=> The Eagle serves food."), 2]
    assert whole[: len(prompt)] != prompt
    assert template.response_text(ROW) == "The Eagle serves food."


def test_options_of_prompt_response(tokenizer):
    encoder = TextEncoder(tokenizer)
    [plain] = PromptResponse(**TEMPLATE).encode([ROW], encoder)
    [no_bos] = PromptResponse(**TEMPLATE, bos=False).encode([ROW], encoder)
    [no_eos] = PromptResponse(**TEMPLATE, eos=False).encode([ROW], encoder)
    [all_scored] = PromptResponse(**TEMPLATE, train_on_prompt=True).encode([ROW], encoder)
    assert no_bos.ids == plain.ids[1:]
    assert no_eos.ids == plain.ids[:-1]
    assert all_scored.ids == plain.ids
    assert all_scored.scored == [False] + [True] * (len(plain.ids) - 1)


def test_bos_is_added_once_or_not_at_all(tokenizer, bare_tokenizer):
    adds_itself = copy.deepcopy(load_tokenizer(tokenizer))
    adds_itself.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert adds_itself("x")["input_ids"] == [1, *_ids(tokenizer, "x"), 2]
    for one in (tokenizer, adds_itself):
        for bos in (None, True):
            assert Text(bos=bos).encode([Row({"text": "x"}, "f:1")], TextEncoder(one))[0].ids == [
                1,
                *_ids(tokenizer, "x"),
                2,
            ]
    bare = TextEncoder(bare_tokenizer)
    assert Text().encode([Row({"text": "x"}, "f:1")], bare)[0].ids == _ids(bare_tokenizer, "x")
    with pytest.raises(ConfigError, match="bos: true, but the tokenizer has no bos token"):
        Text(bos=True).encode([Row({"text": "x"}, "f:1")], bare)


def test_text_scores_all_but_the_first_token(tokenizer):
    template, encoder = Text(field="body"), TextEncoder(tokenizer)
    row = Row({"body": "The quick fox."}, "f:1")
    [example] = template.encode([row], encoder)
    assert example.ids == [1, *_ids(tokenizer, "The quick fox."), 2]
    assert example.scored == [False] + [True] * (len(example.ids) - 1)
    assert template.prompt_ids(row, encoder) == example.ids[:-1]
    assert template.response_text(row) == ""


def test_field_names_are_literal_and_braces_can_be_written():
    row = Row({"a b.c": "1", "x": "{y}", "r": "ok"}, "f:1")
    template = PromptResponse(prompt="{{{a b.c}}} {x}", response="{r}")
    assert template.prompt.fill(row) == "{1} {y}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{a", "expected '}'"),
        ("{}", "a place has no name"),
        ("{a:>5}", "carries a format"),
        ("{a!r}", "carries a format"),
    ],
)
def test_unreadable_template(text, reason):
    with pytest.raises(ConfigError, match=f"The template's prompt .* cannot be read: .*{reason}"):
        PromptResponse(prompt=text, response="{b}")


def test_response_without_a_field():
    with pytest.raises(ConfigError, match="response 'ref' reads no field of the rows"):
        PromptResponse(prompt="{mr}", response="ref")


def test_row_without_the_field_is_named(tokenizer):
    with pytest.raises(DataError, match=r"^f\.csv:2: there is no field 'target'; the row has 'mr', 'ref'"):
        PromptResponse(prompt="{mr}", response="{target}").encode([ROW], TextEncoder(tokenizer))


def _chat(*turns):
    return Row({"messages": [{"role": role, "content": content} for role, content in turns]}, "c.jsonl:3")


def test_chat_scores_exactly_the_assistant_turns(chat_tokenizer):
    encoder = TextEncoder(chat_tokenizer)
    row = _chat(
        ("system", "Be brief."), ("user", "Food?"), ("assistant", "Yes."), ("user", "Where?"), ("assistant", "A dog.")
    )
    [example] = Chat().encode([row], encoder)
    text = "<bos><|system|>Be brief.\n<|user|>Food?\n<|assistant|>Yes.<eos>\n<|user|>Where?\n<|assistant|>A dog.<eos>\n"
    assert chat_tokenizer.decode(example.ids) == text
    scored = [i for i, s in zip(example.ids, example.scored, strict=True) if s]
    assert chat_tokenizer.decode(scored) == "Yes.<eos>\nA dog.<eos>\n"
    assert chat_tokenizer.decode(Chat().prompt_ids(row, encoder)) == text.removesuffix("A dog.<eos>\n")
    assert Chat().response_text(row) == "A dog."


def test_chat_template_that_drops_earlier_turns_scores_no_foreign_token(chat_tokenizer):
    """Some templates rewrite the past; here every turn but the last loses its content."""
    rewriting = copy.deepcopy(chat_tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = _chat(("user", "Food?"), ("assistant", "Yes."), ("user", "Where?"), ("assistant", "A dog."))
    [example] = Chat().encode([row], TextEncoder(rewriting))
    scored = [i for i, s in zip(example.ids, example.scored, strict=True) if s]
    assert rewriting.decode(example.ids) == "<|user|>Food?<|assistant|><|user|>Where?<|assistant|>A dog."
    assert rewriting.decode(scored) == "A dog."


def test_chat_that_ends_with_the_user_is_all_prompt(chat_tokenizer):
    row = _chat(("user", "Food?"))
    ids = Chat().prompt_ids(row, TextEncoder(chat_tokenizer))
    assert chat_tokenizer.decode(ids) == "<bos><|user|>Food?\n<|assistant|>"
    assert Chat().response_text(row) == ""


def test_chat_errors(tokenizer, chat_tokenizer):
    row = _chat(("user", "Food?"), ("assistant", "Yes."))
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template") as caught:
        Chat().encode([row], TextEncoder(tokenizer))
    assert "PromptResponse" in caught.value.hint
    for bad in ("text", [], [{"role": "user"}], None):
        with pytest.raises(DataError, match=r"^c:1: field 'messages' is not a list of messages"):
            Chat().encode([Row({"messages": bad}, "c:1")], TextEncoder(chat_tokenizer))
    strict = copy.deepcopy(chat_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"^c\.jsonl:3: .* refuses the conversation: roles must alternate"):
        Chat().encode([row], TextEncoder(strict))


def test_tokenizer_that_does_not_fit_names_both_sizes(tokenizer):
    row = Row({"text": "The quick brown fox."}, "f:1")
    largest = max(_ids(tokenizer, "The quick brown fox."))
    Text().encode([row], TextEncoder(tokenizer, vocab_size=largest + 1))
    with pytest.raises(
        ConfigError, match=rf"\({len(tokenizer)} entries\) gives id {largest}, .* embeds only {largest} tokens"
    ):
        Text().encode([row], TextEncoder(tokenizer, vocab_size=largest))


def test_pad_falls_back_to_eos_then_to_zero(tokenizer, bare_tokenizer):
    assert TextEncoder(tokenizer).pad_id == 0
    eos_only = copy.deepcopy(bare_tokenizer)
    eos_only.eos_token = "<eos>"
    assert TextEncoder(eos_only).pad_id == 2
    assert TextEncoder(bare_tokenizer).pad_id == 0
    with pytest.raises(ConfigError, match="gives id 2, but the backbone embeds only 2 tokens"):
        TextEncoder(eos_only, vocab_size=2)


def test_tokenizer_is_loaded_from_a_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    assert load_tokenizer(str(tmp_path / "tok"))("The fox")["input_ids"] == tokenizer("The fox")["input_ids"]
    with pytest.raises(ConfigError, match=r"The tokenizer .*nowhere' could not be loaded") as caught:
        load_tokenizer(str(tmp_path / "nowhere"))
    assert "tokenizer.json" in caught.value.hint


def test_table_holds_documents_compactly(tokenizer):
    encoder = TextEncoder(tokenizer)
    examples = PromptResponse(**TEMPLATE).encode([ROW, ROW], encoder)
    table = TokenTable(examples)
    assert len(table) == 2
    assert table.ids.tolist() == examples[0].ids + examples[1].ids
    assert table.scored.tolist() == examples[0].scored + examples[1].scored
    assert table.offsets.tolist() == [0, len(examples[0].ids), 2 * len(examples[0].ids)]
    assert (table.ids.element_size(), table.scored.element_size()) == (4, 1)
