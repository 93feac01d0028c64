import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eetrain.viewing import Detokenizer, Generation, decoded_text, token_texts

SPECIAL = ["<pad>", "<bos>", "<eos>"]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=275, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the hat", "the end ."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "ly", ".", ","]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def pieces(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def test_a_character_belongs_to_the_token_that_completes_it(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("é🦜漢", add_special_tokens=False)["input_ids"]
    assert token_texts(byte_level, ids) == ["", "é", "", "", "", "🦜", "", "", "漢"]


def test_spaces_of_sentencepiece_stay(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = pieces(sentencepiece, "▁Hello", "▁world", "ly", "▁Hello", ".")
    assert token_texts(sentencepiece, ids) == ["Hello", " world", "ly", " Hello", "."]


def test_byte_fallback_characters(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = pieces(sentencepiece, "▁Hello", "<0xE2>", "<0x82>", "<0xAC>", "▁world")
    assert token_texts(sentencepiece, ids) == ["Hello", "", "", "€", " world"]


def test_special_tokens_add_nothing_and_take_no_space(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = pieces(sentencepiece, "<bos>", "▁Hello", "<pad>", "▁world", "<eos>")
    assert token_texts(sentencepiece, ids) == ["", "Hello", "", " world", ""]


def test_a_character_cut_off_at_the_end_is_shown_as_the_decoder_shows_it(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("a🦜", add_special_tokens=False)["input_ids"][:-1]
    assert token_texts(byte_level, ids) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_broken_run_of_bytes_takes_back_its_good_start(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = pieces(sentencepiece, "<0xE2>", "<0x82>", "<0xAC>", "<0xE2>")
    whole = decoded_text(sentencepiece, ids)
    assert "€" not in whole, "this decoder gives up the whole run; without that the test shows nothing"
    assert "".join(token_texts(sentencepiece, ids)) == whole


def test_streamed_pieces_come_as_soon_as_they_are_whole(byte_level: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(byte_level)
    ids = byte_level("the é", add_special_tokens=False)["input_ids"]
    shown = [detokenizer.put(token) for token in ids]
    assert shown[-2:] == ["", "é"]
    assert "".join(shown) == "the é"
    assert detokenizer.end() == ""


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_joined_texts_are_the_decoded_whole(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == decoded_text(tokenizer, ids), ids


def test_generation_stops_at_depth_zero(byte_level: PreTrainedTokenizerFast) -> None:
    ids = byte_level("the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    end, pad = byte_level.eos_token_id, byte_level.pad_token_id
    generation = Generation.read(byte_level, "p", [*ids, end, pad], [3, 4, 0])
    assert [(token.id, token.text, token.depth) for token in generation.tokens] == [(ids[0], "the", 3), (end, "", 4)]
    assert generation.text == "the"
