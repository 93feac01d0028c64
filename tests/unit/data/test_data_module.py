"""The data module as a whole: splits, loaders, arguments, YAML."""

import itertools
import json
import math
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from eetrain.data import CausalLMDataModule, PromptResponse, Text
from eetrain.errors import ConfigError, DataError

TEMPLATE = PromptResponse(prompt="{q}=> ", response="{a}")


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def _rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path):
    words = ["The", "quick", "brown", "fox", "serves", "food", "near", "the", "lazy", "dog"]
    rows = [{"q": " ".join(words[: 1 + n % 5]), "a": " ".join(words[n % 10 :])} for n in range(23)]
    return _write(tmp_path / "pairs.jsonl", rows)


def _scored(loader):
    """All scored tokens, each with the token before it, in any order."""
    found = []
    for batch in loader:
        rows, columns = torch.nonzero(batch["labels"] != -100, as_tuple=True)
        assert (columns > 0).all()
        assert torch.equal(batch["labels"][rows, columns], batch["input_ids"][rows, columns])
        found += zip(
            batch["input_ids"][rows, columns - 1].tolist(), batch["labels"][rows, columns].tolist(), strict=True
        )
    return sorted(found)


def test_batches_hold_the_templates_tokens_in_file_order(pairs, tokenizer):
    data = CausalLMDataModule(tokenizer, validation=pairs, template=TEMPLATE, eval_batch_size=5)
    data.setup("validate")
    rows = _rows(pairs)
    shown = []
    for batch in data.val_dataloader():
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        for ids, labels, mask in zip(*batch.values(), strict=True):
            assert torch.equal(mask.cumprod(0), mask), "padding is on the right"
            shown.append((ids[mask.bool()].tolist(), labels[mask.bool()].tolist()))
            assert (labels[~mask.bool()] == -100).all()
    for row, (ids, labels) in zip(rows, shown, strict=True):
        prompt = [1, *tokenizer(row["q"] + "=> ")["input_ids"]]
        response = [*tokenizer(row["a"])["input_ids"], 2]
        assert ids == prompt + response
        assert labels == [-100] * len(prompt) + response


@pytest.mark.parametrize("workers", [0, 2])
def test_packing_scores_the_same_tokens_in_fewer_full_rows(pairs, tokenizer, workers):
    common = {"train": pairs, "validation": pairs, "template": TEMPLATE, "max_length": 40, "num_workers": workers}
    padded, packed = CausalLMDataModule(tokenizer, **common), CausalLMDataModule(tokenizer, packing=True, **common)
    assert _scored(packed.val_dataloader()) == _scored(padded.val_dataloader())
    assert len(_scored(packed.val_dataloader())) == int(padded.rows("validation").table.scored.sum())
    tokens = int(padded.rows("train").table.offsets[-1])
    assert math.ceil(tokens / 40) <= len(packed.rows("train")) < len(padded.rows("train")) == 23
    for batch in packed.train_dataloader():
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert batch["input_ids"].shape == (8, 40)
        assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
        assert (batch["labels"] != -100).any(dim=1).all(), "no row is empty"


def test_long_documents_are_split_truncated_or_refused(tmp_path, tokenizer):
    path = _write(tmp_path / "t.jsonl", [{"text": "dog"}, {"text": "The lazy dog " * 20}])
    whole = CausalLMDataModule(tokenizer, train=path, max_length=500)
    split = CausalLMDataModule(tokenizer, train=path, max_length=10, batch_size=1)
    assert _scored(split.train_dataloader()) == _scored(CausalLMDataModule(tokenizer, validation=path).val_dataloader())
    cut = CausalLMDataModule(tokenizer, train=path, max_length=10, overflow="truncate")
    lengths = (whole.rows("train").table.offsets.diff()).tolist()
    assert [len(item.ids) for item in cut.rows("train")] == [lengths[0], 10]
    strict = CausalLMDataModule(tokenizer, train=path, max_length=10, overflow="error")
    with pytest.raises(DataError, match=rf"t\.jsonl:2: {lengths[1]} tokens do not fit into max_length 10"):
        strict.setup("fit")


def test_examples_without_room_for_a_response_are_counted(tmp_path, tokenizer):
    rows = [{"q": "x", "a": "y"}, {"q": "The lazy dog " * 9, "a": "y"}, {"q": "fox " * 30, "a": "y"}]
    data = CausalLMDataModule(tokenizer, train=_write(tmp_path / "t.jsonl", rows), template=TEMPLATE, max_length=12)
    with pytest.warns(
        UserWarning, match="2 of the train documents are left out: no scored token fits into max_length 12"
    ):
        data.setup("fit")
    assert len(data.rows("train")) == 1
    none = CausalLMDataModule(tokenizer, train=_write(tmp_path / "t.jsonl", rows[1:]), template=TEMPLATE, max_length=12)
    with pytest.raises(DataError, match="The train data hold no token to score within max_length 12"):
        none.setup("fit")


def test_held_out_fraction_parts_the_rows(pairs, tokenizer):
    def parts(seed, fraction=0.3):
        data = CausalLMDataModule(
            tokenizer, train=pairs, template=TEMPLATE, validation_fraction=fraction, seed=seed, batch_size=1
        )
        data.setup("fit")
        return [[tuple(item.ids.tolist()) for item in data.rows(split)] for split in ("train", "validation")], data

    (train, held_out), data = parts(0)
    assert (len(train), len(held_out)) == (16, 7)
    everything = [
        tuple(item.ids.tolist()) for item in CausalLMDataModule(tokenizer, train=pairs, template=TEMPLATE).rows("train")
    ]
    assert sorted(train + held_out) == sorted(everything)
    assert parts(0)[0] == [train, held_out]
    assert parts(1)[0] != [train, held_out]
    prompts = data.prompts("validation")
    assert [ids[: len(prompt)] for ids, prompt in zip(held_out, prompts.prompts, strict=True)] == [
        tuple(prompt) for prompt in prompts.prompts
    ]
    with pytest.raises(ConfigError, match=r"0\.01 of 23 documents leaves 0 for validation and 23 for training"):
        parts(0, 0.01)


def test_predict_gives_prompts_on_the_left_with_their_rows(pairs, tokenizer):
    data = CausalLMDataModule(tokenizer, predict=pairs, template=TEMPLATE, eval_batch_size=4, limit=6)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    rows = _rows(pairs)[:6]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(6))
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "index"}
        for ids, mask, index in zip(*batch.values(), strict=True):
            assert ids[mask.bool()].tolist() == [1, *tokenizer(rows[int(index)]["q"] + "=> ")["input_ids"]]
            assert torch.equal(mask.flip(0).cumprod(0).flip(0), mask), "padding is on the left"
    assert data.template.response_text(data.prompts("predict").rows[4]) == rows[4]["a"]


def test_prompts_too_long_or_empty(tmp_path, tokenizer, bare_tokenizer):
    path = _write(tmp_path / "p.jsonl", [{"q": "fox " * 30, "a": ""}])
    data = CausalLMDataModule(tokenizer, predict=path, template=TEMPLATE, max_length=9)
    with pytest.warns(UserWarning, match="1 prompts lose their start: max_length is 9"):
        data.setup("predict")
    assert data.prompts("predict").prompts == [[1, *tokenizer("fox " * 30 + "=> ")["input_ids"]][-9:]]
    strict = CausalLMDataModule(tokenizer, predict=path, template=TEMPLATE, max_length=9, overflow="error")
    with pytest.raises(DataError, match=r"p\.jsonl:1: \d+ tokens do not fit into max_length 9"):
        strict.setup("predict")
    empty = CausalLMDataModule(bare_tokenizer, predict=_write(tmp_path / "e.jsonl", [{"text": ""}]))
    with pytest.raises(DataError, match=r"e\.jsonl:1: the prompt has no tokens"):
        empty.setup("predict")


def test_limit_and_missing_split(pairs, tokenizer):
    data = CausalLMDataModule(tokenizer, train=pairs, template=TEMPLATE, limit=3)
    data.setup("fit")
    assert len(data.rows("train")) == 3
    assert data.val_dataloader() == []
    with pytest.raises(ConfigError, match=r"^No test data are set\.") as caught:
        data.test_dataloader()
    assert "data.test" in caught.value.hint


def test_state_without_a_trainer_round_trips(pairs, tokenizer):
    def module():
        return CausalLMDataModule(tokenizer, train=pairs, template=TEMPLATE, batch_size=4)

    first = module()
    assert first.state_dict() == {}
    batches = list(first.train_dataloader())
    state = first.state_dict()
    state["sampler"] |= {"batches": 2}
    second = module()
    second.load_state_dict(state)
    rest = list(second.train_dataloader())
    assert len(rest) == len(batches) - 2
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rest, batches[2:], strict=True))
    assert second.state_dict() == state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, r"max_length is 1\."),
        ({"batch_size": 0}, r"batch_size is 0\."),
        ({"eval_batch_size": 0}, r"eval_batch_size is 0\."),
        ({"num_workers": -1}, r"num_workers is -1\."),
        ({"limit": 0}, r"limit is 0\."),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0\."),
        ({"validation_fraction": 0.1, "validation": "x"}, "Both validation and validation_fraction are set"),
        ({"overflow": "split", "template": TEMPLATE}, "overflow: split does not go with the template PromptResponse"),
    ],
)
def test_arguments_out_of_range(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CausalLMDataModule(tokenizer, **settings)
    assert caught.value.hint


def test_vocab_size_may_be_set_after_construction(pairs, tokenizer):
    data = CausalLMDataModule(tokenizer, train=pairs, template=TEMPLATE)
    data.vocab_size = 10
    with pytest.raises(ConfigError, match="the backbone embeds only 10 tokens"):
        data.setup("fit")


def test_built_from_yaml(tmp_path, pairs, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    settings = {
        "tokenizer": str(tmp_path / "tok"),
        "train": [pairs, pairs],
        "validation_fraction": 0.25,
        "template": {
            "class_path": "eetrain.data.PromptResponse",
            "init_args": {"prompt": "{q}=> ", "response": "{a}", "bos": False},
        },
        "packing": True,
        "max_length": 64,
        "overflow": "truncate",
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": settings}))
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(CausalLMDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "c.yaml")])).data
    assert isinstance(data, LightningDataModule)
    assert data.template.bos is False
    data.prepare_data()
    data.setup("fit")
    assert len(data.rows("train").table) == 46


def test_default_template_reads_plain_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("The quick brown fox")
    data = CausalLMDataModule(tokenizer, train=str(tmp_path / "*.txt"))
    assert isinstance(data.template, Text)
    [item] = data.rows("train")
    assert item.ids.tolist() == [1, *tokenizer("The quick brown fox")["input_ids"], 2]


class Counter(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.counts = {"validate": 0, "test": 0, "predict": 0}

    def validation_step(self, batch):
        self.counts["validate"] += int((batch["labels"] != -100).sum())

    def test_step(self, batch):
        self.counts["test"] += int((batch["labels"] != -100).sum())

    def predict_step(self, batch):
        self.counts["predict"] += len(batch["index"])


def test_every_stage_runs_under_a_trainer(pairs, tokenizer):
    data = CausalLMDataModule(
        tokenizer, validation=pairs, test=pairs, predict=pairs, template=TEMPLATE, eval_batch_size=4
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module = Counter()
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    rows = _rows(pairs)
    scored = sum(len(tokenizer(row["a"])["input_ids"]) + 1 for row in rows)
    assert module.counts == {"validate": scored, "test": scored, "predict": len(rows)}


def test_epochs_of_the_loader_alone_follow_the_sampler(pairs, tokenizer):
    data = CausalLMDataModule(tokenizer, train=pairs, template=TEMPLATE, batch_size=6)
    loader = data.train_dataloader()
    once, again = list(loader), list(loader)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in itertools.zip_longest(once, again))
