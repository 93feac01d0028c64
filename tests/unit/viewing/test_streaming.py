"""A streamer that knows depths shows what the finished generation shows."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eetrain import ExitConfig, MultiExitModel
from eetrain.testing.tiny import tiny_model
from eetrain.viewing import DepthStreamer, Generation


def words_tokenizer():
    vocabulary = {f"w{number}": number for number in range(61)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def test_tokens_come_with_their_own_depths():
    model = MultiExitModel(tiny_model("llama", eos_token_id=None), ExitConfig(layers=[1, 2, 3], head="tied")).eval()
    tokenizer, shown = words_tokenizer(), []
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(0))
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=2.0,
        exit_policy="threshold:0.045",
        streamer=DepthStreamer(tokenizer, shown.append),
        return_dict_in_generate=True,
    )
    whole = Generation.read(tokenizer, "", output.sequences[0, 7:].tolist(), output.exit_trace[0].tolist())
    assert tuple(shown) == whole.tokens
    assert len({token.depth for token in shown}) > 1
