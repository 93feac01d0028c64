"""What surrounds the loop: transformers' processors, criteria, streamers and outputs, and what is refused."""

from __future__ import annotations

import string
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from eetrain import ExitConfig, MultiExitModel
from eetrain.decoding import EarlyExitOutput, Never, Threshold
from eetrain.errors import ConfigError
from eetrain.testing.tiny import tiny_model

PROMPT = 6


def model_of(family: str = "llama", head: str = "norm", **changes) -> MultiExitModel:
    return MultiExitModel(tiny_model(family, **changes), ExitConfig(layers=[1, 3], head=head)).eval()


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return model_of()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, batch, **kwargs):
    """Plain transformers and the loop under `never`, from the same random state."""
    set_seed(7)
    want = model.causal_lm.generate(**batch, **kwargs)
    set_seed(7)
    return want, model.generate(**batch, **kwargs, exit_policy="never")


SAMPLED = {"do_sample": True, "max_new_tokens": 12, "temperature": 3.0, "eos_token_id": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": list(range(3, 30))},
        {"eos_token_id": list(range(3, 12))},
        {"num_return_sequences": 3},
        {"bad_words_ids": [[5], [7, 8]]},
        {"max_length": 9, "max_new_tokens": None},
        {"do_sample": False, "temperature": None},
        {"do_sample": False, "temperature": None, "repetition_penalty": 2.0, "eos_token_id": list(range(3, 20))},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_tokens_equal_transformers_with_the_same_seed(model, batch, options):
    want, got = both(model, batch, **{**SAMPLED, **options})
    assert torch.equal(got, want)
    assert got.shape[1] > PROMPT


def test_rows_that_end_early_leave_the_random_numbers_of_others_alone(model, batch):
    want, got = both(model, batch, **{**SAMPLED, "eos_token_id": list(range(3, 9))})
    ends = [(row[PROMPT:] == 0).sum().item() for row in want]
    assert len(set(ends)) > 1, "rows must end at unequal steps"
    assert torch.equal(got, want)


def letters() -> PreTrainedTokenizerFast:
    """One character a token: 61 of them."""
    names = ["<pad>", "<s>", "</s>", *string.ascii_letters, *"012345"]
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_stop_strings_stop_where_transformers_stops(model, batch):
    free = model.causal_lm.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    target = letters().decode(free[0, PROMPT + 1 : PROMPT + 3])
    assert len(target) == 2
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 2, "tokenizer": letters()}
    want, got = both(model, batch, stop_strings=[target], **options)
    assert torch.equal(got, want)
    assert (want[0, PROMPT + 3 :] == 0).all(), "row 0 must have been stopped"
    with pytest.raises(ConfigError, match=r"stop_strings=\['a'\] needs a tokenizer") as caught:
        model.generate(**batch, stop_strings=["a"])
    assert "tokenizer=tokenizer" in caught.value.hint
    stored = GenerationConfig(stop_strings=["a"])
    with pytest.raises(ConfigError, match=r"stop_strings=\['a'\] stand in a generation config"):
        model.generate(**batch, generation_config=stored, tokenizer=letters())


class StopOn(StoppingCriteria):
    """Ends rows on tokens below a number."""

    def __init__(self, below: int) -> None:
        self.below, self.calls = below, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return input_ids[:, -1] < self.below


def test_custom_stopping_criteria_end_single_rows(model, batch):
    options = {**SAMPLED, "pad_token_id": 0}
    ours, theirs = StopOn(15), StopOn(15)
    set_seed(3)
    want = model.causal_lm.generate(**batch, **options, stopping_criteria=StoppingCriteriaList([theirs]))
    set_seed(3)
    got = model.generate(**batch, **options, stopping_criteria=StoppingCriteriaList([ours]))
    assert ours.calls == theirs.calls == got.shape[1] - PROMPT < 12
    assert torch.equal(got, want)
    plain_list = model.generate(**batch, max_new_tokens=4, stopping_criteria=[StopOn(61)])
    assert plain_list.shape[1] == PROMPT + 1


class Force(LogitsProcessor):
    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 3 + input_ids.shape[1] % 5] = 0.0
        return forced


def test_custom_logits_processors_decide(model, batch):
    processors = LogitsProcessorList([Force()])
    out = model.generate(**batch, max_new_tokens=4, logits_processor=processors, exit_policy="threshold:0.05")
    assert out[:, PROMPT:].tolist() == [[4, 5, 6, 7]] * 3


def test_prefix_allowed_tokens_and_bare_inputs(model, batch):
    out = model.generate(batch["input_ids"][:1], max_new_tokens=3, prefix_allowed_tokens_fn=lambda _row, _ids: [9])
    assert out[0, PROMPT:].tolist() == [9, 9, 9]
    by_name = model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=3)
    assert torch.equal(by_name, model.generate(batch["input_ids"][:1], max_new_tokens=3))


@pytest.mark.parametrize("policy", ["never", "always:3", "threshold:0.045", "threshold:0.045,repair=propagate"])
def test_outputs_have_the_shapes_of_transformers(model, batch, policy):
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(**batch, **SAMPLED, top_k=0, **wanted, exit_policy=policy)
    assert isinstance(out, EarlyExitOutput)
    assert out.sequences.shape == (3, PROMPT + 12)
    for values in (out.scores, out.logits):
        assert [value.shape for value in values] == [(3, 61)] * 12
        assert all(value.dtype == torch.float32 for value in values)
    assert out.exit_trace.shape == (3, 12)
    assert out.exit_trace.dtype == torch.long
    assert set(out.exit_trace.flatten().tolist()) <= {1, 3, 4}
    torch.testing.assert_close(out.scores[0], out.logits[0] / 3.0)
    waiting = out.exit_trace[:, 1:].flip(1).cummax(1).values if "propagate" not in policy else out.exit_trace[:, 1:]
    assert out.block_calls == int(waiting.sum())
    bare = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True)
    assert bare.scores is None
    assert bare.logits is None
    assert bare["exit_trace"].tolist() == [[4, 4]] * 3


def test_results_can_be_trained_on(model, batch):
    """Decoding runs in inference mode; what it returns must not be stuck in it."""
    out = model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert not out.sequences.is_inference()
    assert not out.logits[0].is_inference()
    embedding = torch.nn.Embedding(61, 2)
    embedding(out.sequences).sum().backward()
    assert embedding.weight.grad is not None


class Collect:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("policy", ["never", "always:1", "threshold:0.045"])
def test_a_streamer_gets_every_token_of_every_row_and_the_end(model, batch, policy):
    streamer = Collect()
    out = model.generate(
        **batch, max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=streamer, exit_policy=policy
    )
    assert streamer.ended == 1
    assert torch.equal(streamer.values[0], batch["input_ids"])
    assert torch.equal(torch.stack(streamer.values[1:], 1), out[:, PROMPT:])


def test_streaming_goes_on_for_the_rows_left(model, batch):
    streamer = Collect()
    set_seed(7)
    out = model.generate(**batch, **{**SAMPLED, "eos_token_id": list(range(3, 9))}, streamer=streamer)
    assert (out[:, PROMPT:] == 0).any()
    assert torch.equal(torch.stack(streamer.values[1:], 1), out[:, PROMPT:])


REFUSED = [
    ({"num_beams": 2}, r"generate\(num_beams=2\) is not supported with exits: beam search would have to reorder rows"),
    ({"penalty_alpha": 0.6, "top_k": 4}, r"generate\(penalty_alpha=0.6\).*contrastive search"),
    ({"dola_layers": "low"}, r"generate\(dola_layers='low'\).*DoLa contrasts layers"),
    ({"assistant_early_exit": 2}, r"generate\(assistant_early_exit=2\).*drafts with transformers' own loop"),
    ({"prompt_lookup_num_tokens": 2}, r"generate\(prompt_lookup_num_tokens=2\).*verifies with transformers' own loop"),
    ({"prefill_chunk_size": 2}, r"generate\(prefill_chunk_size=2\).*the prompt is run in one piece"),
    ({"cache_implementation": "static"}, r"generate\(cache_implementation='static'\).*a cache of its own"),
    ({"use_cache": False}, r"generate\(use_cache=False\).*the loop is built on the cache"),
    ({"output_attentions": True}, r"generate\(output_attentions=True\).*rows run different blocks"),
    ({"output_hidden_states": True}, r"generate\(output_hidden_states=True\).*rows run different blocks"),
    ({"assistant_model": object()}, r"generate\(assistant_model=\.\.\.\).*speculation with a second model"),
    ({"past_key_values": DynamicCache()}, r"generate\(past_key_values=\.\.\.\).*a cache of somebody else's"),
    ({"inputs_embeds": torch.zeros(1, 2, 32)}, r"generate\(inputs_embeds=\.\.\.\).*prompts given as embeddings"),
    ({"negative_prompt_ids": torch.ones(1, 2)}, r"generate\(negative_prompt_ids=\.\.\.\).*classifier-free guidance"),
    ({"custom_generate": "somebody/loop"}, r"generate\(custom_generate=\.\.\.\).*another generation loop"),
]


@pytest.mark.parametrize(("option", "reason"), REFUSED, ids=[next(iter(option)) for option, _ in REFUSED])
def test_modes_that_exits_cannot_serve_are_refused_with_the_reason(model, batch, option, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        model.generate(**batch, **option)
    assert "model.causal_lm.generate" in caught.value.hint


def test_a_generation_config_is_checked_and_used_too(model, batch):
    with pytest.raises(ConfigError, match="num_beams=3"):
        model.generate(**batch, generation_config=GenerationConfig(num_beams=3))
    with pytest.raises(ConfigError, match="use_cache=False"):
        model.generate(**batch, generation_config=GenerationConfig(use_cache=False))
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(**batch, generation_config=config).shape[1] == PROMPT + 3


def test_a_stored_use_cache_false_is_a_habit_of_training(batch):
    model = model_of()
    model.causal_lm.generation_config.use_cache = False
    model.causal_lm.config.use_cache = False
    assert model.generate(**batch, max_new_tokens=2).shape[1] == PROMPT + 2


def test_a_prompt_that_fills_the_positions_is_refused(batch):
    model = model_of(max_position_embeddings=PROMPT)
    with pytest.raises(ConfigError, match="The prompt has 6 tokens, but the model has 6 positions") as caught:
        model.generate(**batch)
    assert "Shorten the prompt" in caught.value.hint


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_decoding_stops_at_the_positions_with_a_warning(batch, family):
    limit = {"n_positions": 10} if family == "gpt2" else {"max_position_embeddings": 10}
    model = model_of(family, **limit)
    with pytest.warns(UserWarning, match="26 tokens asked for, the model has 10 positions: stopping there"):
        out = model.generate(**batch, max_new_tokens=20, eos_token_id=None)
    assert out.shape[1] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(**batch, max_new_tokens=4, eos_token_id=None).shape[1] == 10


def depths(model, batch, **kwargs) -> list[int]:
    out = model.generate(**batch, max_new_tokens=3, eos_token_id=None, return_dict_in_generate=True, **kwargs)
    return out.exit_trace.unique().tolist()


def test_the_stored_policy_is_the_default(batch):
    model = model_of()
    assert depths(model, batch) == [4]
    model.causal_lm.generation_config.exit_policy = "always:1"
    assert depths(model, batch) == [1]
    given = GenerationConfig(exit_policy="always:3")
    assert depths(model, batch, generation_config=given) == [3]
    assert depths(model, batch, generation_config=given, exit_policy="always:1") == [1]
    assert depths(model, batch, exit_policy=Never()) == [4]
    assert depths(model, batch, exit_policy=Threshold(2.0)) == [4]


def test_policies_that_do_not_fit_the_model_are_refused(model, batch):
    for policy, reason in (
        ("always:2", "always:2: the model has no exit after block 2"),
        ("threshold:0.9,exits=1+2", "the model has no exit after block 2"),
        ("sometimes", "'sometimes' is none of never"),
    ):
        with pytest.raises(ConfigError, match=reason):
            model.generate(**batch, exit_policy=policy)
    none = MultiExitModel(model.backbone, ExitConfig(layers=[]))
    with pytest.raises(ConfigError, match="no exit below its last block") as caught:
        none.generate(**batch, exit_policy="threshold:0.5")
    assert caught.value.hint == "Exits stand after blocks none."
    assert none.generate(**batch, max_new_tokens=2).shape[1] == PROMPT + 2


def test_training_modes_are_restored_module_by_module(batch):
    model = model_of()
    model.train()
    model.backbone.eval()
    model.backbone.get_submodule("model.norm").train()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    model.generate(**batch, max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ConfigError):
        model.generate(**batch, num_beams=2)
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(**batch, max_new_tokens=2, stopping_criteria=[Raising()])
    assert {name: module.training for name, module in model.named_modules()} == before


class Raising(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("stop here")


def test_dropout_is_off_while_decoding(batch):
    model = model_of(attention_dropout=0.0)
    for block in model.causal_lm.model.layers:
        block.self_attn.attention_dropout = 0.9
    model.train()
    assert torch.equal(model.generate(**batch, max_new_tokens=6), model.generate(**batch, max_new_tokens=6))
